import http.client
import json
import signal
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from recorded_runs import served, write_metrics
from titan_metrics.report.cli import main


def get(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read().decode()


def update(address, versions):
    request = urllib.request.Request(address + "update", data=json.dumps(versions).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_live_run_is_shown_and_followed(make_run):
    folder = make_run(status="running")
    with served(folder) as (_, address):
        html = get(address)
        assert "connect-src 'self'" in html
        assert 'id="live"' in html
        everything = update(address, {})
        assert everything["parts"]["chart/loss"]["series"][0]["x"][-1] == 60
        assert update(address, everything["versions"])["parts"] == {}
        write_metrics(folder, [61])
        news = update(address, everything["versions"])["parts"]
        assert news["chart/loss"]["series"][0]["x"][-1] == 61
        assert "section/configuration" not in news


def test_ctrl_c_ends_it_cleanly(bare_run):
    with served(bare_run) as (process, address):
        get(address)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0
        assert error == ""


def test_a_file_that_is_damaged_meanwhile_is_told_and_not_the_end(bare_run):
    with served(bare_run) as (_, address):
        path = bare_run / "metrics.jsonl"
        good = path.read_text()
        path.write_text(good + "damaged\n" + good)
        with pytest.raises(urllib.error.HTTPError) as raised:
            update(address, {})
        with raised.value as error:
            assert error.code == 503
            assert "line 4, is not a JSON object" in json.load(error)["error"]
        path.unlink()
        path.write_text(good)
        assert update(address, {})["parts"]["chart/loss"]["series"][0]["y"] == [3, 2, 1]


def test_only_this_machine_and_this_page_are_answered(bare_run):
    with served(bare_run) as (_, address):
        port = urlsplit(address).port
        for method, path, host, status in (
            ("GET", "/", "evil.example:80", 403),
            ("GET", "/etc/passwd", f"localhost:{port}", 404),
            ("POST", "/", f"localhost:{port}", 404),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, path, headers={"Host": host}, body=b"" if method == "POST" else None)
            assert connection.getresponse().status == status, (method, path, host)
            connection.close()


def test_a_port_that_is_taken_is_an_error(bare_run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(bare_run), "--serve", str(port)]) == 1
    assert f"Cannot listen on port {port}" in capsys.readouterr().err
