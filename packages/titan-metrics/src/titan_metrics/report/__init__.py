"""`titan-report`: what run directories hold, as one page that opens from disk and asks the network for nothing.

`files` and `run` read a run and follow it while it grows, `curve` keeps a metric of any length in bounded memory,
`sections` decides what the page says, `charts`, `timeline`, `shares`, `tables` prepare its parts, `document` puts them
together, `server` shows a live run, and `cli` is the command.

Curves are drawn by uPlot (MIT licence, 50 kB, no dependencies, what Grafana draws its time series with), whose
distribution lies unchanged in `assets`.
"""
