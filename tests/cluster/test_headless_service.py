"""Names of several addresses: the documented script names each as a worker of its own."""

import os
import re
import subprocess
from pathlib import Path

from tsqp.runtime.workers_file import WorkersFile
from tsqp.wire.keys import write_key_pair

GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "deployment.md"
RESOLVER = """\
#!/bin/sh
test "$*" = "ahostsv4 workers" || exit 2
for address in $(cat "$ADDRESSES"); do
    echo "$address     STREAM workers"
    echo "$address     DGRAM  "
    echo "$address     RAW    "
done
"""


def script(keys: Path) -> str:
    found = re.search(r"```sh\n(getent .*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    return found[1].replace("/etc/tsqp/workers/", f"{keys}/")


def test_each_address_of_a_name_is_a_worker_and_is_resolved_again(tmp_path: Path) -> None:
    keys, resolver = tmp_path / "keys", tmp_path / "bin" / "getent"
    keys.mkdir()
    resolver.parent.mkdir()
    resolver.write_text(RESOLVER)
    resolver.chmod(0o755)
    public: dict[str, str] = {}
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        _, path, public[address] = write_key_pair(tmp_path / address)
        path.rename(keys / f"{address}.pub")
    environment = os.environ | {
        "PATH": f"{resolver.parent}:{os.environ['PATH']}",
        "ADDRESSES": str(tmp_path / "addresses"),
    }
    file = WorkersFile(tmp_path / "workers")
    for addresses in (["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "10.0.0.3"]):
        (tmp_path / "addresses").write_text(" ".join(addresses))
        subprocess.run(["sh", "-c", script(keys)], cwd=tmp_path, env=environment, check=True)
        assert file.changed() == [
            (f"gpu-{n}", f"tcp://{address}:7000", public[address])
            for n, address in enumerate(addresses, 1)
        ]
