"""Where linear layers run: builds the offload of each privacy mode."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from tsqp.algebra import digits
from tsqp.algebra.params import LATTICE
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.footprint import trusted_bytes
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.model_digest import check_expected, model_digest
from tsqp.checkpoint.progress import Counter, Progress, part_of, silent
from tsqp.checkpoint.quantize import IntegerWeights, integer_bytes
from tsqp.checkpoint.shard_digests import ShardDigests, float_shard_digests
from tsqp.checkpoint.weights import check_memory, embedding_bytes, read_bias, read_embedding
from tsqp.checkpoint.weights_digest import WeightsDigest, weights_digest
from tsqp.gpu.worker import LATTICE_ABILITY
from tsqp.model.config import linear_groups, trusted_shapes
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import check_divisible
from tsqp.nn.kv_cache import KvCache
from tsqp.runtime.check_sets import SPARE_SETS, CheckSets
from tsqp.runtime.failover import Begin, Failover
from tsqp.runtime.field_auto import with_cheaper_field
from tsqp.runtime.hints_cache import hints_path, keep_hints, load_with_hints
from tsqp.runtime.hints_of_workers import add_with_hints_of_workers
from tsqp.runtime.kv_memory import check_kv_memory, kv_cache
from tsqp.runtime.open_sessions import begins_with_own_kv, begins_with_remote_kv
from tsqp.runtime.options import WORKER_HINTS, Options
from tsqp.runtime.pad_memory import pad_memory, say_if_limited
from tsqp.runtime.pad_sessions import PadSessions
from tsqp.runtime.replicas import Replicas
from tsqp.runtime.segment_size import segment_bytes
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.crypto import lattice_kernels
from tsqp.tee.crypto.freivalds import Trust, process_limit
from tsqp.tee.crypto.kernels import compile_loops
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pad_providers import DirectProvider, PadProvider
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.fixed_point_linear import FixedPointLinear
from tsqp.tee.offload.lattice_group import LatticeGroup, process_switch
from tsqp.tee.offload.lattice_load import LatticeLoad, compile_lattice_loops
from tsqp.tee.offload.local import LocalOffload
from tsqp.tee.offload.masked import Group, Kept, LinearPart, MaskedGroup, PrivateOffload
from tsqp.tee.offload.offload import Offload
from tsqp.tee.offload.shards import cut_groups
from tsqp.tee.offload.shares import SharesLinear
from tsqp.tee.worker_view import WatchedOffload, WorkerView
from tsqp.wire.channel import Channel

log = logging.getLogger("tsqp")


class Builder:
    """Builds the offload of one model; reads from the checkpoint what the TEE needs.

    Args:
        norms: the model's norms, if they were read already.
        progress: called while weights are read, with the bytes done and their total.
        view: samples what workers receive.

    Attributes:
        options: as given; `build` replaces a field that is to be measured.
        model_digest: see `tsqp.checkpoint.model_digest`; empty until `build` knows it.
        weights_digest: the digest of all weights that workers hold; the same.
    """

    def __init__(
        self,
        options: Options,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        norms: WeightsDigest | None = None,
        progress: Progress = silent,
        view: WorkerView | None = None,
    ) -> None:
        self.options = options
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._dtype = dtype
        # Each tensor is read once, so that the tensor that is hashed is the one that is used.
        self._read = WeightsDigest() if norms is None else norms
        self._progress = progress
        self._view = view
        self.model_digest = self.weights_digest = ""
        self._pad_memory: int | None = None  # with which `--field auto` decided for lattice masks
        self._replicas: Replicas | None = None
        self._shards = 1  # that the workers hold; 1 if each holds the whole model
        self._shard_digests: tuple[str, ...] = ()

    def build(self, failover: Failover) -> list[Begin]:
        """Read what the TEE needs; returns for each alternative what begins its sessions.

        Args:
            failover: the workers of the options' endpoints, not yet connected.

        Raises:
            UnexpectedModel: this is not the model that the options ask for.
        """
        workers = failover.workers
        if workers:
            process_limit.check()
        self._replicas = failover.current if isinstance(failover.current, Replicas) else None
        check_sets = len(failover.alternatives)
        if self._replicas is not None:
            self._shards = self._replicas.count
            check_sets = self._sets_of_a_shard(workers)
        elif self.options.privacy == "open" and check_sets == 1:
            self._shards = max(1, len(workers))
        check_divisible(linear_groups(self._config), self._shards)
        if self.options.field == "auto" and self.options.masked:
            needed = self._lattice_bytes(check_sets)
            name, shapes = self._checkpoint.name, self._shapes()
            memory = pad_memory(self.options.pad_memory, LATTICE, shapes, needed)
            self.options = with_cheaper_field(self.options, name, needed, shapes, memory)
            if self.options.lattice:
                self._pad_memory = memory
        options = self.options
        if options.lattice:
            kept = self._lattice_bytes(check_sets)
            what = f"The hints of {self._checkpoint.name}, which --field wide does without,"
            check_memory(kept, what, "choose --field wide")
        else:
            kept = trusted_bytes(
                self._config,
                self._dtype,
                options.privacy,
                fixed_point=options.fixed_point,
                alternatives=check_sets,
            )
            check_memory(kept, f"The weights of {self._checkpoint.name}")
        if options.kv_memory is not None:
            check_kv_memory(self._config, self._dtype, options.kv_memory)
        if options.lattice:
            return self._lattice(failover)
        if options.masked:
            return self._masked(workers)
        if options.privacy == "open":
            return self._open(workers)
        kv = self._kv_cache(to_read=kept)
        offload = LocalOffload(self._checkpoint, self._dtype, self._progress, self._read, kv)
        self._identify(weights_digest(self._checkpoint, self._dtype, digest=self._read))
        return [lambda: (offload, None)]

    def _open(self, workers: Sequence[WorkerProcess]) -> list[Begin]:
        biases_F = self._biases_F()
        digest = weights_digest(
            self._checkpoint, self._dtype, digest=self._read, progress=self._progress
        )
        self._identify(digest)
        self._shard_digests = float_shard_digests(self._checkpoint, self._dtype, self._shards)

        def connect(worker: WorkerProcess, abilities: Sequence[str]) -> Channel:
            return self._connect(worker, digest, self._dtype.itemsize, abilities)

        given = self.options, self._config, self._dtype, biases_F
        if self.options.fuse_layers or self.options.gpu_attention:
            return begins_with_remote_kv(*given, workers, connect)
        alternatives = [workers] if self._shards > 1 else [[worker] for worker in workers]
        return begins_with_own_kv(*given, self._kv_cache(), alternatives, connect)

    def _masked(self, workers: Sequence[WorkerProcess]) -> list[Begin]:
        options, field = self.options, self.options.residues
        integers: dict[LinearGroup, IntegerWeights] = {}
        biases_F = self._biases_F()
        digest, embedding_VD = self._load(integers.__setitem__)
        private = self._private(embedding_VD)
        weights_FD = {group: weights.weight_FD for group, weights in integers.items()}
        if options.fixed_point and field is LATTICE:
            lattice_kernels.compile_loops()
            digits.compile_loops(LATTICE)
            lattice_groups = {
                group: LatticeGroup(group, weights, biases_F.get(group))
                for group, weights in integers.items()
            }
            exact = FixedPointLinear(lattice_groups, weights_FD, self._dtype, self._row_pool())
            offload = private(exact)
            return [lambda: (offload, None)]
        groups = {
            group: MaskedGroup(group, weights, biases_F.get(group), field)
            for group, weights in integers.items()
        }
        compile_loops(field, shares=options.privacy == "shares")
        if options.privacy == "tee":
            fixed_point = FixedPointLinear(groups, weights_FD, self._dtype, self._row_pool())
            offload = private(fixed_point)
            return [lambda: (offload, None)]

        trust, watched = Trust(process_limit), self._watched(groups)

        def begin_shares() -> tuple[Offload, None]:
            trust.check()
            channels = [self._connect(worker, digest, field.residue_bytes) for worker in workers]
            row_pool, timeout = self._row_pool(), options.timeout
            shares = SharesLinear(channels, watched, self._dtype, timeout, row_pool, trust)
            return private(shares), None

        if options.privacy == "shares":
            return [begin_shares]
        direct = DirectProvider(weights_FD, field)
        sessions = self._pad_sessions(digest, lambda _: direct, embedding_VD)
        if self._replicas is not None:
            sets = CheckSets(self._shards, [], lambda of: cut_groups(groups, weights_FD, of))
            return sessions.together(self._replicas, sets)
        others = [
            {group: each.with_own_checks(weights_FD[group]) for group, each in groups.items()}
            for _ in workers[1:]
        ]
        return sessions.one_at_a_time(workers, [groups, *others])

    def _lattice(self, failover: Failover) -> list[Begin]:
        process_switch.check()
        compile_lattice_loops()
        if self.options.hints == WORKER_HINTS:
            load, digest, embedding_VD = self._load_with_hints_of(failover)
        else:
            new_load = partial(
                LatticeLoad,
                self._shapes(),
                self._biases_F(),
                workers=self._sets_of_a_shard(failover.workers),
                shards=self._shards,
            )
            given = self.options.hints
            path = hints_path(self._checkpoint, self._shapes()) if given is None else Path(given)
            with closing(self._row_pool()) as row_pool:
                load, (digest, embedding_VD) = load_with_hints(
                    path, given is not None, new_load, self._load, row_pool
                )
        sessions = self._pad_sessions(digest, load.provider, embedding_VD)
        if self._replicas is not None:
            return sessions.together(self._replicas, CheckSets(self._shards, load.groups))
        [each_worker] = load.groups
        return sessions.one_at_a_time(failover.workers, each_worker)

    def _pad_sessions(
        self, digest: str, provider: Callable[[int], PadProvider], embedding_VD: torch.Tensor
    ) -> PadSessions:
        """What begins sessions of `pad`.

        Args:
            provider: makes the provider of pads for a stock of this many bytes.
        """
        options, shapes, memory = self.options, self._shapes(), self._pad_memory
        if memory is None:
            memory = pad_memory(options.pad_memory, options.residues, shapes)
        if options.lattice and options.pad_memory is None:
            say_if_limited(shapes, memory)
        abilities = [LATTICE_ABILITY] if options.lattice else []

        def connect(worker: WorkerProcess) -> Channel:
            return self._connect(worker, digest, options.residues.residue_bytes, abilities)

        return PadSessions(
            connect,
            list(shapes),
            lambda: PadPool(provider(memory), shapes, memory),
            self._row_pool,
            self._private(embedding_VD),
            self._watched,
            self._dtype,
            options.timeout,
            process_limit,
        )

    def _private(self, embedding_VD: torch.Tensor) -> Callable[[LinearPart], PrivateOffload]:
        """Makes the offload of each session; all of them use the same KV cache."""
        kv, view = self._kv_cache(), self._view

        def private(linear: LinearPart) -> PrivateOffload:
            given = self._config, kv, embedding_VD, linear
            return PrivateOffload(*given) if view is None else WatchedOffload(view, *given)

        return private

    def _watched(
        self, groups: Mapping[LinearGroup, Group[Kept]]
    ) -> Mapping[LinearGroup, Group[Kept]]:
        """The groups, of which the view samples one."""
        return groups if self._view is None else self._view.watch(groups, self._config.num_layers)

    def _load_with_hints_of(self, failover: Failover) -> tuple[LatticeLoad, str, torch.Tensor]:
        """Load for lattice masks with hints that a worker makes; see also `_load`."""
        integers: dict[LinearGroup, IntegerWeights] = {}
        biases_F, shapes = self._biases_F(), self._shapes()
        to_make = integer_bytes(self._config)  # hints count as much as the weights
        digest, embedding_VD = self._load(integers.__setitem__, more=to_make)
        before = self._load_bytes()
        made = Counter(to_make, part_of(self._progress, before, before + to_make))

        def connect(worker: WorkerProcess) -> Channel:
            return self._connect(worker, digest, LATTICE.residue_bytes, [LATTICE_ABILITY])

        with closing(self._row_pool()) as row_pool:
            load = LatticeLoad(shapes, biases_F, workers=len(failover.workers), row_pool=row_pool)
            add_with_hints_of_workers(
                load, integers, failover, connect, self.options.timeout, process_limit, made.add
            )
        path = hints_path(self._checkpoint, shapes)
        if path is not None and not path.exists():
            keep_hints(path, load, digest)
        return load, digest, embedding_VD

    def _sets_of_a_shard(self, workers: Sequence[WorkerProcess]) -> int:
        """For how many workers of each shard there must be check vectors."""
        later = 0 if self.options.workers_file is None else SPARE_SETS
        return len(workers) - self._shards + 1 + later

    def _lattice_bytes(self, alternatives: int) -> int:
        """Bytes that the TEE needs while it loads for lattice masks."""
        needed = trusted_bytes(
            self._config, self._dtype, "pad", lattice=True, alternatives=alternatives
        )
        if self.options.hints == WORKER_HINTS:
            needed += integer_bytes(self._config)  # until the hints are checked
        return needed

    def _load_bytes(self) -> int:
        """Bytes that `_load` reports."""
        return integer_bytes(self._config) + embedding_bytes(self._config, self._dtype)

    def _load(
        self, place: Callable[[LinearGroup, IntegerWeights], None], more: int = 0
    ) -> tuple[str, torch.Tensor]:
        """The digest of the integer weights, which `place` gets, and the embedding.

        Args:
            more: bytes that the caller reports as progress afterwards.
        """
        done = self._load_bytes()
        total = done + more
        shards = ShardDigests(self._shards)

        def add(group: LinearGroup, weights: IntegerWeights) -> None:
            shards.add(group, weights)
            place(group, weights)

        digest = load_integers(self._checkpoint, add, part_of(self._progress, 0, total))
        self._shard_digests = shards.hexdigests()
        embedding_VD = read_embedding(self._checkpoint, self._dtype, self._read)
        self._progress(done, total)
        trusted = weights_digest(
            self._checkpoint,
            self._dtype,
            shapes=trusted_shapes(self._config),
            digest=self._read,
        )
        self._identify(digest, trusted)
        return digest, embedding_VD

    def _shapes(self) -> dict[LinearGroup, tuple[int, int]]:
        return {group: group.shape for group in linear_groups(self._config)}

    def _row_pool(self) -> RowPool:
        return RowPool(self.options.threads or torch.get_num_threads())

    def _identify(self, weights: str, trusted: str | None = None) -> None:
        """Compute the model's digest, and refuse it if the options ask for another one."""
        self.weights_digest = weights
        files = self._checkpoint.file_digests()
        self.model_digest = model_digest(files, self._dtype, weights, trusted)
        log.info("model digest %s", self.model_digest)
        check_expected(self.model_digest, self.options.expect_model, self._checkpoint.name)

    def _biases_F(self) -> dict[LinearGroup, torch.Tensor]:
        found = {
            group: read_bias(self._checkpoint, group, self._dtype, self._read)
            for group in linear_groups(self._config)
        }
        return {group: bias_F for group, bias_F in found.items() if bias_F is not None}

    def _kv_cache(self, to_read: int = 0) -> KvCache:
        return kv_cache(self._config, self._dtype, self.options.kv_memory, to_read)

    def _connect(
        self, worker: WorkerProcess, digest: str, itemsize: int, abilities: Sequence[str] = ()
    ) -> Channel:
        reason = self.options.no_shm_reason
        shm_bytes = 0 if reason else segment_bytes(self._config, self.options, itemsize)
        return worker.connect(
            self._checkpoint, digest, shm_bytes, reason, abilities, self._shard_digests
        )
