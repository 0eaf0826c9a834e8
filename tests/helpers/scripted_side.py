"""A side of a benchmark that follows a script: what a problem's name says is what happens, at times nobody measures.

`dies-SIDE`, `hangs-SIDE`, `oom-SIDE`, `illegal-SIDE`: that happens to SIDE while it makes ready; `late-SIDE`: it dies
while it is sampled. `mumbles-SIDE`: its answers are cut off. Every other problem takes 200 us in stock torch and
100 us in convplan.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import msgspec

from convplan import _bench_child as messages
from convplan._child import connection_to_parent

TIMES_US = {"stock": 200.0, "convplan": 100.0, "compile": 150.0}


def answer(side: str, name: str, request: messages.Request) -> messages.Answer:
    if not isinstance(request, messages.Prepare):
        if name == f"late-{side}":
            os.kill(os.getpid(), signal.SIGSEGV)
        return messages.Sample(TIMES_US[side])
    if name == f"dies-{side}":
        os.write(sys.stderr.fileno(), b"the script says that it ends here")
        os._exit(3)
    if name == f"hangs-{side}":
        time.sleep(600)
    if name == f"oom-{side}":
        return messages.Failed("OutOfMemoryError", "no room for 9 TiB", usable=True)
    if name == f"illegal-{side}":
        return messages.Failed("AcceleratorError", "an illegal memory access", usable=False)
    return messages.Ready(
        call=f"{side} in process {os.getpid()}",
        how="host clock",
        unit_us=TIMES_US[side],
        environment="scripted",
        problem=name,
        from_plan=side == "convplan",
    )


def main() -> None:
    connection = connection_to_parent()
    side, name = sys.argv[1], ""
    while True:
        try:
            request = msgspec.json.decode(connection.recv_bytes(), type=messages.Request)
        except EOFError:
            return
        if isinstance(request, messages.Prepare):
            name = request.named.name
        said = msgspec.json.encode(answer(side, name, request))
        connection.send_bytes(said[:-3] if name == f"mumbles-{side}" else said)


if __name__ == "__main__":
    main()
