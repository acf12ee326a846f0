"""Free memory by files that a kernel would write."""

import pytest

from dpo_jax.distributed import host_memory

GIB = 2**30


def write(root, **files):
  for name, text in files.items():
    path = root / name.replace("__", "/").replace("_dot_", ".")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def meminfo(available, swap=0):
  return f"MemTotal: 99 kB\nMemAvailable:  {available * 2**20} kB\nSwapFree: {swap * 2**20} kB\n"


def group(root, folder, limit, used, stat, version=2):
  """A control group of `limit` GiB ("max" for none), of which `used` GiB are taken."""
  names = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
  }[version]
  place = root / "sys/fs/cgroup" / folder
  place.mkdir(parents=True, exist_ok=True)
  (place / names[0]).write_text(f"{limit * GIB if isinstance(limit, int) else limit}\n")
  (place / names[1]).write_text(f"{used * GIB}\n")
  (place / "memory.stat").write_text(stat)


def test_what_the_kernel_has_with_swap(tmp_path):
  assert host_memory.available(tmp_path) is None
  write(tmp_path, proc__meminfo=meminfo(16, swap=2))
  assert host_memory.available(tmp_path) == 18 * GIB


@pytest.mark.parametrize("inside", [True, False])
def test_a_group_of_version_2_counts_its_page_cache_as_free(tmp_path, inside):
  write(tmp_path, proc__meminfo=meminfo(16), proc__self__cgroup="0::/user/job\n")
  # In a container the path may be that of the host, and the top is the container's group.
  folder = "user/job" if inside else ""
  group(tmp_path, folder, 8, 5, f"anon {2 * GIB}\nfile {3 * GIB}\ninactive_file {GIB}\n")
  assert host_memory.available(tmp_path) == 6 * GIB


def test_the_least_of_all_groups_around_it_counts(tmp_path):
  write(tmp_path, proc__meminfo=meminfo(16), proc__self__cgroup="0::/user/job\n")
  group(tmp_path, "user", 4, 1, "file 0\n")
  group(tmp_path, "user/job", "max", 1, "file 0\n")
  assert host_memory.available(tmp_path) == 3 * GIB


def test_a_group_of_version_1(tmp_path):
  lines = "3:cpu,cpuacct:/job\n2:memory:/job\n1:name=systemd:/job\n"
  write(tmp_path, proc__meminfo=meminfo(16), proc__self__cgroup=lines)
  group(tmp_path, "memory", 2**33, 4, "", version=1)  # no limit
  group(tmp_path, "memory/job", 6, 5, f"cache 1\ntotal_cache {GIB}\n", version=1)
  assert host_memory.available(tmp_path) == 2 * GIB


def test_this_machine_has_some():
  found = host_memory.available()
  assert found is None or found > 2**20
