"""The picture of a schedule has every action in its place."""

import pytest

from llmsys import env
from llmsys.parallel.gantt import gantt
from llmsys.parallel.schedule import orders
from llmsys.parallel.timeline import Costs, timeline

COSTS = Costs(forward_s=1, backward_s=1, weight_s=1)


def test_bars(tmp_path):
    pytest.importorskip("matplotlib")
    actions = orders("zb_v", 3, 6)
    times = timeline(actions, COSTS)
    figure = gantt(actions, times, "ZB-V")
    (axes,) = figure.axes
    for stage, bars in enumerate(axes.collections):
        boxes = [path.get_extents() for path in bars.get_paths()]
        assert tuple(box.x0 for box in boxes) == pytest.approx(times.start_s[stage])
        assert tuple(box.x1 for box in boxes) == pytest.approx(times.end_s[stage])
        assert all(round(box.y0 + box.y1) == 2 * stage for box in boxes)
        assert len({tuple(colour) for colour in bars.get_facecolors()}) == 6  # F, B, W of two chunks
    assert [text.get_text() for text in axes.texts] == [str(action.micro) for row in actions for action in row]
    assert axes.get_title() == "ZB-V 0.0% idle"
    figure.savefig(tmp_path / "zb_v.png")
    assert (tmp_path / "zb_v.png").stat().st_size > 10_000


def test_many_microbatches_have_no_numbers():
    pytest.importorskip("matplotlib")
    actions = orders("1f1b", 2, 65)
    assert not gantt(actions, timeline(actions, COSTS)).axes[0].texts


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(env, "has", lambda package: False)
    actions = orders("1f1b", 2, 2)
    with pytest.raises(
        RuntimeError, match=r"^llmsys\.parallel\.gantt: matplotlib is missing, .* pip install matplotlib"
    ):
        gantt(actions, timeline(actions, COSTS))
