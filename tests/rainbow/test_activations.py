"""How much memory may be taken: what is available, within the limits of the container."""

import pytest

from rainbow.activations import MOST_MEMORY, free_memory

MEMINFO = "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n"
V1, V2 = "12:cpu,cpuacct:/\n8:memory:/docker/ab\n", "0::/user/job\n"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, MOST_MEMORY),
        ({"proc/meminfo": "MemTotal: 8 kB\n"}, MOST_MEMORY),
        ({"proc/meminfo": MEMINFO}, 4000 * 1024),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": V2, "memory.max": "max\n", "memory.current": "9"}, 4000 * 1024),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": V2, "memory.max": "1000", "memory.current": "900"}, 100),
        ({"proc/self/cgroup": V2, "user/memory.max": "1000", "user/memory.current": "1001"}, 0),
        (
            {"proc/self/cgroup": V2, "user/job/memory.max": "1000", "user/job/memory.current": "900"}
            | {"user/job/memory.stat": "anon 500\ninactive_file 300\n"},
            400,
        ),
        (
            {"proc/meminfo": MEMINFO, "proc/self/cgroup": V1, "memory/memory.usage_in_bytes": "400"}
            | {"memory/memory.limit_in_bytes": "1000", "memory/memory.stat": "total_inactive_file 7\n"},
            607,
        ),
    ],
)
def test_free_memory_is_what_is_available_within_the_limits(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / (name if name.startswith("proc") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == expected
