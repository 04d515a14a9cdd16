"""tools/summarize_model.py on a model of the quick start."""

import re
from collections.abc import Callable

SMALL = ["MODEL.RPN.POST_NMS_TOPK_TEST", 5, "TEST.DETECTIONS_PER_IMAGE", 2]
CONFIG = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"


def test_table_adds_up(call_tool: Callable[..., tuple[int, str, str]]) -> None:
    options = ["--size", 32, 64, *SMALL, "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.DEVICE", "cuda"]
    status, output, _ = call_tool("summarize_model.py", "--config-file", CONFIG, *options)
    assert status == 0
    rows = {
        cells[0]: [float(cell.replace(",", "")) for cell in cells[1:]]
        for cells in re.findall(
            r"^\| (\S+(?:, rest)?) +" + r"\| +([\d,.]+) +" * 6 + r"\|$", output, re.M
        )
    }
    whole = rows.pop("model")
    assert len(rows) == 6
    for column, total in enumerate(whole):
        # FLOPs and activations of six rows are rounded to 0.05
        tolerance = 0.5 if column > 3 else 0
        assert abs(sum(row[column] for row in rows.values()) - total) <= tolerance
    # the stem has 3*64*49 weights, each of four convs of res2 64*64*9; GN 2*64 after each
    assert rows["backbone.bottom_up"][1] == 9408 + 4 * 36864 + 5 * 128
    assert [rows["roi_heads.mask_head"][i] for i in (2, 3)] == [4, 2]
    assert re.search(
        r"^Model: [\d.]+ M parameters, 32 WS convs \(official, eps 1e-05\), "
        r"frozen: backbone.bottom_up.stem, backbone.bottom_up.res2$",
        output,
        re.M,
    )


def test_wrong_sizes_are_refused(call_tool: Callable[..., tuple[int, str, str]]) -> None:
    command = "summarize_model.py", "--config-file", CONFIG, "--size", "0", "64"
    status, _, errors = call_tool(*command)
    assert status == 2 and "argument --size: it is 0; allowed: 1 or more" in errors


def test_stability_of_features(call_tool: Callable[..., tuple[int, str, str]]) -> None:
    command = "summarize_model.py", "--config-file", CONFIG, "--size", 32, 64, "--stability", 2
    status, output, _ = call_tool(*command, *SMALL)
    found = re.search(r"\(cosine, 2 images, random weights\): (.+)$", output, re.M)
    assert status == 0 and found
    stages = dict(part.split() for part in found[1].split(", "))
    assert [*stages] == ["res2", "res3", "res4", "res5"]
    assert 1 > float(stages["res2"]) > float(stages["res5"]) > 0.3
