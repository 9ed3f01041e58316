"""Becomes the command it is given, tied to its parent's life: `python child.py PARENT_PID COMMAND...`.

A process killed outright cannot end its children, so each child asks the kernel to be killed with it. A `preexec_fn`
would do the same inside a fork of the proxy, but is not safe beside the proxy's threads. Run with `-I -S`: it needs
nothing but the standard library, and starts in some 15 ms.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        return 1
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is the point
    except OSError as error:
        sys.stderr.write(f"ERROR cannot run {command[0]}: {error.strerror}\n")
    return 127


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
