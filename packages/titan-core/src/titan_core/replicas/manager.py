"""The parts of torchft that replica groups use. Importing this needs the extra `torchft`."""

import datetime
import gc
import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, TCPStore
from torchft.checkpointing import HTTPTransport
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo, ProcessGroupNCCL, ProcessGroupWrapper

from titan_core.replicas.config import ReplicaConfig

# Whenever a group dies torchft logs tracebacks as errors, which Python prints if nobody listens; it is what we are for.
logging.getLogger("torchft").addHandler(logging.NullHandler())

_KNOCK_SECONDS = 5.0  # for one connection to a machine that answers


class _Renewed(ProcessGroupWrapper):
    """What both kinds of process groups have in common: they say when they were connected anew."""

    renewed = False

    def configure(self, store_addr: str, *args: Any, **kwargs: Any) -> None:
        """Connects to the groups of a new quorum, through the store of one of them.

        Raises:
            OSError: at once if that group is no more, where the store's client would try for long.
        """
        self.renewed = True
        host, _, port = store_addr.partition("/")[0].rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
        super().configure(store_addr, *args, **kwargs)


class Gloo(_Renewed, ProcessGroupGloo):
    """The same rank of all groups, on CPUs."""

    def abort(self, errored: bool = True) -> None:
        """Closes the connections, by which others learn that they need not wait.

        Gloo's own abort leaves them open; they close with the last reference, and finished work lies in cycles.
        """
        super().abort(errored)
        gc.collect()


class Nccl(_Renewed, ProcessGroupNCCL):
    """The same rank of all groups, on GPUs."""


class Transport(HTTPTransport[Any]):
    """Hands a rank's state to another group, under the host name that was configured."""

    def __init__(self, host: str, timeout: datetime.timedelta) -> None:
        super().__init__(timeout, num_chunks=0)
        self._host = host

    def metadata(self) -> str:
        """Where the state can be fetched."""
        return super().metadata().replace(f"//{socket.gethostname()}:", f"//{self._host}:", 1)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: datetime.timedelta) -> Any:
        """Fetches a state."""
        with warnings.catch_warnings():  # of torch, which only copies from what it calls not writable
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return super().recv_checkpoint(src_rank, metadata, step, timeout)


def lighthouse_address(config: ReplicaConfig) -> str | None:
    """Where the Lighthouse is; None if nobody has said it."""
    return config.lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE")


def open_store(host: str, ranks: ProcessGroup | None) -> TCPStore:
    """A store of this group's own, on its rank 0, through which other groups find its ranks.

    The launcher's would do, but it outlives workers that it starts again, with addresses of those that are no more.
    """
    timeout = datetime.timedelta(seconds=60)
    if ranks is None or ranks.rank() == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        address = [(host, store.port)]
        if ranks is not None:
            dist.broadcast_object_list(address, group=ranks, group_src=0)
        return store
    found: list[Any] = [None]
    dist.broadcast_object_list(found, group=ranks, group_src=0)
    return TCPStore(*found[0], is_master=False, wait_for_workers=False, timeout=timeout)


def open_manager(
    config: ReplicaConfig,
    process_group: Gloo | Nccl,
    store: TCPStore,
    *,
    host: str,
    ranks: ProcessGroup | None,
    state_dict: Callable[[], dict[str, Any]],
    load_state_dict: Callable[[Any], None],
) -> Manager:
    """This rank's manager, which agrees with the other groups on who is there; quorums are waited for."""
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    return Manager(
        process_group,
        load_state_dict,
        state_dict,
        min_replica_size=config.min_groups,
        use_async_quorum=False,  # which rows are read depends on the quorum
        timeout=timeout,
        connect_timeout=timeout,
        quorum_timeout=datetime.timedelta(seconds=config.quorum_seconds),
        rank=0 if ranks is None else ranks.rank(),
        world_size=1 if ranks is None else ranks.size(),
        store_addr=store.host,
        store_port=store.port,
        lighthouse_addr=lighthouse_address(config),
        replica_id=f"group-{config.group:05}",
        hostname=host,
        heartbeat_interval=datetime.timedelta(seconds=config.heartbeat_seconds),
        checkpoint_transport=Transport(host, timeout),
        init_sync=False,  # initial weights are the same on every layout
    )


def process_group_for(device: torch.device, timeout: datetime.timedelta) -> Gloo | Nccl:
    """What joins the same rank of all groups, for tensors on `device`; not connected yet."""
    return Nccl(timeout) if device.type == "cuda" else Gloo(timeout)
