"""Progress bars that act at a step: the one place where a test reaches into a running training."""

from collections.abc import Callable, Iterator

import pytest

from moss_rlhf.progress import Bar, Progress


class ActingBar(Bar):
    def __init__(self, title: str, total: int | None, act: Callable[[int], None]) -> None:
        super().__init__(title, total, visible=False)
        self.act = act

    def advance(self, count: int = 1, text: str | None = None) -> None:
        super().advance(count, text)
        if count:
            self.act(self.done)


class ActingProgress(Progress):
    """Calls `act(steps done)` after every step of fine-tuning."""

    def __init__(self, act: Callable[[int], None]) -> None:
        super().__init__(quiet=True)
        self.act = act

    def bar(self, title: str, total: int | None) -> Bar:
        return (
            ActingBar(title, total, self.act) if title in ("fine-tuning", "pretraining") else super().bar(title, total)
        )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are three times as fast on one thread as on two that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def acting() -> type[ActingProgress]:
    return ActingProgress
