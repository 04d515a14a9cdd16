"""What is written beside a measurement."""

import platform
import re
from datetime import datetime, timezone
from importlib.metadata import version

from ws_detectron.environment import environment


def test_machine_date_and_versions() -> None:
    found = environment(["torch", "no-such-distribution"])
    assert found["torch"] == version("torch") and "no-such-distribution" not in found
    assert found["python"] == platform.python_version()
    written = datetime.strptime(found["date"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - written).total_seconds()) < 3600
    assert found["cores"] >= 1 and re.search(r"\w", found["cpu"])
