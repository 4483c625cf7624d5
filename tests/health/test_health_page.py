"""The HTML report in a real browser: it opens from disk, runs nothing that a name smuggles in, and
opens the layer that the address names.
"""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest

from jbn import health
from jbn.health import __main__ as command
from jbn.health import page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--dump-dom",
]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'"


def variables(broken=False):
    rng = np.random.default_rng(0)
    names = {"calm": 8, "trouble": 40, HOSTILE: 3}
    stats = {
        name: {
            "mean": rng.normal(size=c).astype(np.float32),
            "var": rng.uniform(0.5, 2, c).astype(np.float32),
        }
        for name, c in names.items()
    }
    if broken:
        stats["trouble"]["var"][[7, 9]] = 0
        stats["trouble"]["mean"][3] = np.nan
    learned = {name: {"scale": np.ones(c, np.float32)} for name, c in names.items()}
    return {"params": learned, "batch_stats": stats}


def steps():
    tree = {step: health.model_report(variables(step == "200")) for step in ("100", "200")}
    return page.render(tree)


def dom(text, folder, fragment=""):
    """What the page has become in the browser."""
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    (folder / "page.html").write_text(text, encoding="utf-8")
    address = (folder / "page.html").as_uri() + fragment
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, profile, address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def opened(text):
    return re.findall(r'<details data-layer="([^"]*)" open', text)


def test_a_layer_in_the_address_opens_with_its_channels(tmp_path):
    shown = dom(steps(), tmp_path, "#trouble")
    assert opened(shown) == ["trouble"]
    # The script drew one canvas per map, and a button per checkpoint, the last one chosen.
    assert shown.count("<canvas") == 4
    assert 'aria-label="signal, 40 channels"' in shown
    assert '<button aria-pressed="false">100</button>' in shown
    assert '<button aria-pressed="true">200</button>' in shown


def test_without_an_address_nothing_is_open(tmp_path):
    shown = dom(steps(), tmp_path)
    assert opened(shown) == []
    assert "<canvas" not in shown


def test_a_hostile_name_is_text(tmp_path):
    text = steps()
    assert HOSTILE not in text
    shown = dom(text, tmp_path, "#" + "".join(f"%{byte:02X}" for byte in HOSTILE.encode()))
    assert "<title>Batch norms</title>" in shown
    assert [html.unescape(name) for name in opened(shown)] == [HOSTILE]
    assert len(re.findall("<img", shown)) == 0


def test_nothing_is_loaded_from_elsewhere():
    text = steps()
    assert re.findall(r"https?:|//[a-z]|@import|url\(|<link|<img|<iframe", text) == []
    assert "default-src 'none'" in text


def test_layers_are_sorted_by_trouble_and_warnings_have_remedies():
    text = steps()
    names = [html.unescape(name) for name in re.findall(r'<details data-layer="([^"]*)"', text)]
    assert names == ["trouble", "calm", HOSTILE]
    assert "not finite, channel 3" in text
    assert "dead, channels 7, 9" in text
    assert "Remedy: restore the last good checkpoint" in text
    assert "; 2 checkpoints: 100, 200." in text
    assert "Red marks" not in text
    assert text.count("<svg") >= 6  # a line in every row, and in every layer one for each number
    assert "<td>min signal</td><td class=number>1</td><td class=number>0</td>" in text


def test_a_monitor_shows_what_happened_and_when():
    monitor = health.Monitor()
    for step in range(40):
        dead = float(10 <= step < 20)
        monitor.update(step, {"calm/dead": dead, "trouble/dead": 0.0, "loss": 1 / (step + 1)})
    text = monitor.to_html(health.model_report(variables()))
    row = r'<tr><td class=number>10</td><td><a href="#calm">calm</a></td><td><span class=kind>dead<'
    assert re.search(row + ".*?<td class=number>22</td></tr>", text)
    assert '<span class="kind back">dead, past</span>' in text
    assert "<h2>loss</h2>" in text
    assert "dead at step 10" in text, "what is over is not said to last since then"
    assert "Red marks: a limit is crossed" in text
    assert "<small>dead</small><svg" in text, "the line of a row says what it shows"
    assert re.search(r'<line x1="25.64" .*?<title>step 10: dead</title>', text)


def test_a_sparkline_breaks_where_there_is_no_number():
    line = page._svg([0, 1, 2, 3, 4], [0, 1, np.nan, 1, 0], [])
    assert re.findall('d="([^"]*)"', line) == ["M0 28L25 2M75 2L100 28"]
    long = page._svg(range(5000), np.where(np.arange(5000) == 1234, 9.0, 0.0), [])
    assert len(re.findall("[ML]", long)) < 300
    assert " 2L" in long  # the single high point is kept


@pytest.mark.third_party
def test_the_command_writes_a_page_of_all_steps(tmp_path, capsys):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10, 100):
            manager.save(step, args=ocp.args.StandardSave(variables(step == 100)))
        manager.wait_until_finished()
    out = tmp_path / "out.html"
    assert command.main([str(tmp_path / "run"), "--html", str(out)]) == 1
    printed = capsys.readouterr().out
    assert re.findall("== (.*)", printed) == ["9", "10", "100"]
    text = out.read_text()
    head = "".join(f"<th class=number>{step}</th>" for step in (9, 10, 100))
    assert head in text
    assert "steps 9 to 100" in text
