// uPlot formats numbers in the browser's language, which one without a locale spells as no format knows it: en-US@posix.
try {
  new Intl.NumberFormat(navigator.language);
} catch {
  Object.defineProperty(navigator, "language", { value: "en" });
}
