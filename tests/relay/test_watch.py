"""Time-outs."""

import asyncio

from proxy.relay.watch import Watch


class Broken:
    def look(self, now: float) -> None:
        raise RuntimeError("a bug")


class Counting:
    def __init__(self) -> None:
        self.looks = 0
        self.looked_thrice = asyncio.Event()

    def look(self, now: float) -> None:
        self.looks += 1
        if self.looks == 3:
            self.looked_thrice.set()


async def test_one_that_fails_does_not_leave_the_others_unwatched() -> None:
    watch, other = Watch(), Counting()
    watch.keep_to(0.2)
    watch.under_way |= {Broken(), other}
    watching = asyncio.create_task(watch.run())
    async with asyncio.timeout(5):
        await other.looked_thrice.wait()
    watching.cancel()
