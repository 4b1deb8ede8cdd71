"""Workers: pieces of work done by actors of Ray, each as this process would do it, or by this process."""

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from toca_compile.errors import TocaError

Work = Callable[[Any], Any]

_RETRIES = 3  # of a piece whose worker died: one that kills every worker ends here


def gpus_each(workers: int) -> int:
    """How many GPUs Ray, which is started if it does not run, has for each worker: one or none."""
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0


class Actor:
    """One worker, with torch set as where it was asked for: sums are then added up alike.

    Args:
        make: called once, before the first piece of work.
        threads, grad, inference: as torch says them.
    """

    def __init__(self, make: Callable[[], Work], threads: int, grad: bool, inference: bool) -> None:
        self._make = make
        self._work: Work | None = None
        self._grad, self._inference = grad, inference
        torch.set_num_threads(threads)

    def do(self, item: Any) -> Any:
        """One piece of work."""
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            if self._work is None:
                self._work = self._make()
            return self._work(item)


class Workers:
    """Processes on the machines of Ray that do pieces of work, until the context ends.

    Args:
        make: what each calls once, for what it does a piece of work with. It is sent to them, with all that it holds.
        count: how many; one that dies begins anew, and does its piece again. 0: this process does it.

    Raises:
        TocaError: Ray is not installed, or what they need cannot be sent to them.
    """

    def __init__(self, make: Callable[[], Work], count: int) -> None:
        self._make = make
        self._actors: list[Any] = []
        if count and find_spec("ray") is None:
            raise TocaError(
                f"workers={count} needs Ray, which is not installed: pip install 'toca-compile[scale]', or workers=0"
            )
        if not count:
            return
        import ray

        options = {"num_cpus": 1, "num_gpus": gpus_each(count), "max_restarts": -1, "max_task_retries": _RETRIES}
        told = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        try:
            sent = ray.put(make)
        except Exception as error:
            raise TocaError(f"what the workers need cannot be sent to them ({error}): leave workers out") from error
        self._actors = [ray.remote(**options)(Actor).remote(sent, *told) for _ in range(count)]

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """What comes of each, in their order."""
        if not self._actors:
            return map(self._make(), items)
        from ray.util import ActorPool

        return iter(ActorPool(self._actors).map(lambda actor, item: actor.do.remote(item), items))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End them."""
        for actor in self._actors:
            import ray

            ray.kill(actor)
