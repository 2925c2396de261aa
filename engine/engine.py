"""One thread, one model: it loads, decodes every sequence in one batch a step, and frees.

`Engine.step` is drain, schedule, decode, sample, deliver. Results go to the loop in one callback a step and never wait
for a reader.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.constraint import ConstraintFailedError, Constraints
from engine.counters import EngineCounters
from engine.llama import (
    DECODE_ABORTED,
    DECODE_OK,
    VERSION,
    Batch,
    LlamaContext,
    LlamaModel,
    SamplerChain,
    return_memory,
    supports_gpu,
    system_info,
)
from engine.logprobs import step_logprobs
from engine.options import EngineOptions
from engine.penalties import Penalties
from engine.prefix_cache import MIN_SAVED, PrefixCache, Reuse, ReuseRule, Source
from engine.prompt_lookup import PromptLookup
from engine.scheduler import N_BATCH, Scheduler, Share
from engine.sequence import Sequence, SequenceEvent, SequenceFinished, SequenceStarted, SequenceState, TokenEmitted
from engine.speculation import MAX_ROWS, SURE_STREAK, Outlook, Speculation
from engine.state_file import model_stamp, origin_of
from engine.state_folder import StateFolder
from engine.step_watch import StepWatch
from infsvc.errors import LlamaError, LoadError

log = logging.getLogger("infsvc.engine")

_PART_JOIN_S = 10.0
_LOOK_S = 0.25
"""How long a load waits for what lies on disk to be known, so that the first request finds it."""
_LEAVE_S = 1.0
"""How long an end may take to write what the next start would use: a node has 5 s to end."""


class Part(Protocol):
    """A thread of its own over an engine's weights."""

    def close(self) -> None: ...

    def join(self, timeout_s: float) -> bool: ...


class Engine:
    """A loaded model that decodes. `submit`, `cancel` and `close` may be called from any thread.

    Args:
        name: the model's name, for the thread and the log.
        loop: where events are delivered.
        on_progress: 0..1 while loading, on the engine's thread.
        on_died: called on the loop with a sentence when the thread ended by a fault, or hangs in a step.
    """

    def __init__(
        self,
        name: str,
        options: EngineOptions,
        loop: asyncio.AbstractEventLoop,
        *,
        on_progress: Callable[[float], None] | None = None,
        on_died: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.options = options
        self.counters = EngineCounters()
        self.loaded: Future[None] = Future()
        self.n_ctx = options.n_ctx
        self._loop = loop
        self._on_progress = on_progress
        self._on_died = on_died
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._gate = threading.Lock()
        self._ended = False
        self._died: str | None = None
        self._parts: list[Part] = []
        self._model: LlamaModel | None = None
        self._context: LlamaContext | None = None
        self._prefixes: PrefixCache
        self._speculation: Speculation | None = None
        self._clock: Callable[[], float] = time.perf_counter
        self._folder: StateFolder | None = None
        self._stamp: tuple[tuple[str, int, int, int], ...] = ()
        self._flash_attention = options.flash_attention
        self._stalled = False
        self._may_abort = True
        self._snapshots: dict[int, npt.NDArray[np.uint8]] = {}
        self._running: tuple[Sequence, ...] = ()
        self._live: dict[int, Sequence] = {}
        self._watch = StepWatch(loop, f"{name}'s engine", self._give_up)
        self._hung = False
        self._outbox: list[SequenceEvent] = []
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread; `loaded` is done when the model is ready, or holds the `LoadError`."""
        self.loaded.set_running_or_notify_cancel()
        self._thread.start()
        self._post(lambda _: self._watch.look(), None)

    @property
    def model(self) -> LlamaModel:
        """The loaded model, for tokenising."""
        if self._model is None:
            raise LlamaError("the model is not loaded")
        return self._model

    @property
    def died(self) -> str | None:
        """Why it ended by itself, if it did."""
        return self._died

    def constraints(self) -> Constraints:
        """What compiles constraints for this vocabulary, and keeps the compiled ones."""
        return Constraints(self.model.texts, self.model.eog.tolist())

    def attach(self, part: Part) -> None:
        """Names something that lives on this model's weights: it is ended before they are freed. Raises `LlamaError`
        when the engine has ended."""
        with self._gate:
            if self._ended:
                raise LlamaError("the engine has ended")
            self._parts.append(part)

    def submit(self, sequence: Sequence) -> None:
        """Hands a sequence over; its listener hears of all that follows, of its end in any case.

        The caller has checked that the prompt is not empty and fits `n_ctx`; one that does not ends as an error. Once
        the engine has ended a sequence ends at once: as cancelled, or as an error when the engine died.
        """
        with self._gate:
            if not self._ended:
                self._live[sequence.arrival] = sequence
                self._inbox.put(sequence)
                return
        self._post(_hand_out, [self._farewell(sequence)])

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence between two steps, or in the middle of one when nobody else is in the batch."""
        sequence.cancelled = True
        context = self._context
        if context is not None and self._may_abort and self._running and all(each.cancelled for each in self._running):
            context.abort()
        self._inbox.put(None)

    def close(self) -> None:
        """Tells the thread to end: what runs ends as cancelled, then the memory is freed. `join` waits for it."""
        self._closing.set()
        self._watch.stop()
        context = self._context
        if context is not None:
            context.abort()
        self._inbox.put(None)

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread's end; False when it still runs. Call it off the loop."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _give_up(self, reason: str) -> None:
        """Ends for everyone else what the thread does not end. When it comes back after all it frees the memory."""
        log.error(reason, extra={"code": "engine.hung", "model": self.name})
        with self._gate:
            self._ended = self._hung = True
            self._died = reason
        self.close()
        now = time.perf_counter()
        # The thread may yet tell of them too: what comes after a sequence's last event is dropped.
        self._tell([SequenceFinished(each, now, "", "error", reason) for each in self._live.values()])
        if self._on_died is not None:
            self._on_died(reason)

    def _tell(self, events: list[SequenceEvent]) -> None:
        """Each event to its sequence's listener, up to its last."""
        live = [event for event in events if event.sequence.arrival in self._live]
        for event in live:
            if isinstance(event, SequenceFinished):
                self._live.pop(event.sequence.arrival, None)
        _hand_out(live)

    # -- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        scheduler: Scheduler | None = None
        try:
            try:
                context, batch = self._load()
            except BaseException as error:
                known = isinstance(error, LoadError)
                self._died = str(error) if known else f"the load failed: {error}"
                self.loaded.set_exception(error if known else LoadError(self._died))
                return
            self._prefixes = self._open_prefixes(context)
            if self.options.n_threads == 1 and not (supports_gpu() and self.options.n_gpu_layers):
                # All is computed on this thread, and what a neighbour takes of the machine is not the step's price.
                self._clock = time.thread_time
            if self.model.has_recurrence:
                self.counters.speculation = "off, because a recurrent state cannot be cut"
            else:
                self._speculation = Speculation()
                self.counters.speculation = "on, where it pays" if self.options.draft_max else "off until asked for"
            scheduler = Scheduler(
                n_slots=self.options.n_slots, n_batch=min(context.n_batch, N_BATCH), prefixes=self._prefixes
            )
            self.loaded.set_result(None)
            while not self._closing.is_set():
                self._step(context, batch, scheduler)
        except Exception as error:
            self._died = f"the engine of {self.name} stopped: {error}"
            log.exception(self._died, extra={"code": "engine.died", "model": self.name})
        finally:
            # Half of a batch that was aborted may be in a recurrent state, which has no way back.
            torn = {each.slot for each in scheduler.running} if scheduler is not None and not self._may_abort else set()
            self._end_all(scheduler)
            if self._folder is not None:
                self._leave_states(self._folder, torn)
            if scheduler is not None:
                self._prefixes.store.clear()
            self._snapshots.clear()
            if self._context is not None:
                self._context.close()
            for part in self._parts:
                part.close()
            # Weights that are still read are never freed.
            n_stuck = sum(not part.join(_PART_JOIN_S) for part in self._parts)
            if self._model is not None and not n_stuck:
                self._model.close()
            return_memory()
            if self._died is not None and not self._hung and scheduler is not None and self._on_died is not None:
                self._post(self._on_died, self._died)

    def _load(self) -> tuple[LlamaContext, Batch]:
        options = self.options

        def progress(fraction: float) -> bool:
            if self._on_progress is not None:
                with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                    self._on_progress(fraction)
            return not self._closing.is_set()

        on_gpu = supports_gpu() and options.n_gpu_layers != 0
        if options.state_folder is not None:
            with suppress(OSError):  # the load will say so
                self._stamp = model_stamp(options.path)
        model = LlamaModel(
            options.path,
            n_gpu_layers=options.n_gpu_layers if on_gpu else 0,
            use_extra_bufts=options.use_extra_bufts,
            on_progress=progress,
        )
        self._model = model
        if model.has_encoder or not model.has_decoder:
            raise LoadError("this kind of model (with an encoder) is not served by this version")
        n_ctx = options.n_ctx or model.n_ctx_train
        if model.n_ctx_train and n_ctx > model.n_ctx_train:
            log.warning(
                f"CTX_SIZE {n_ctx} is more than the model was trained on: {model.n_ctx_train} tokens are used",
                extra={"code": "model.context_capped", "model": self.name},
            )
            n_ctx = model.n_ctx_train
        self.n_ctx = n_ctx
        context = LlamaContext(
            model,
            n_ctx=n_ctx,
            n_slots=options.n_slots,
            n_batch=N_BATCH,
            n_threads=options.n_threads or os.cpu_count() or 1,
            flash_attention=on_gpu or options.flash_attention,
            swa_full=options.swa_full,
        )
        self._flash_attention = on_gpu or options.flash_attention
        self._context = context
        # A recurrent state has no way back to before a batch that was aborted half way.
        self._may_abort = not model.has_recurrence
        return context, Batch(N_BATCH, options.n_slots)

    def _open_prefixes(self, context: LlamaContext) -> PrefixCache:
        model = self.model
        if not self.options.share_prefixes:
            reuse = Reuse(ReuseRule.OFF)
        elif model.has_recurrence:
            reuse = Reuse(ReuseRule.ENDS)
        elif model.n_window:
            reuse = Reuse(ReuseRule.WINDOW, model.n_window)
        else:
            reuse = Reuse(ReuseRule.ANYWHERE)
        self.counters.prefix_reuse = reuse.rule.value
        prefixes = PrefixCache(
            n_slots=self.options.n_slots,
            n_ctx=context.n_ctx,
            reuse=reuse,
            budget_bytes=self.options.prefix_cache_bytes,
            first_position=context.first_position,
        )
        if reuse.rule is not ReuseRule.OFF:
            self._open_folder(context, prefixes)
        return prefixes

    def _open_folder(self, context: LlamaContext, prefixes: PrefixCache) -> None:
        """Has states outlive the store, where that is asked for."""
        options = self.options
        if options.state_folder is None or not options.state_folder_bytes or not prefixes.store.budget_bytes:
            return
        try:
            origin = origin_of(
                options.path,
                *(VERSION, system_info(), N_BATCH, context.n_ctx, context.cache_types, self._flash_attention),
                *(options.n_slots, options.n_gpu_layers, options.use_extra_bufts, options.swa_full),
            )
            changed = model_stamp(options.path) != self._stamp
        except OSError as error:
            log.warning(f"{options.path} cannot be told from others ({error}): prompts' states are kept in RAM only",
                        extra={"code": "prefix.disk_failed", "model": self.name})  # fmt: skip
            return
        if changed:
            log.warning(f"{options.path} was replaced while it was loaded: prompts' states are kept in RAM only",
                        extra={"code": "prefix.disk_failed", "model": self.name})  # fmt: skip
            return
        folder = self._folder = StateFolder(
            options.state_folder,
            name=self.name,
            origin=origin,
            budget_bytes=options.state_folder_bytes,
            cuttable=prefixes.reuse.rule is ReuseRule.ANYWHERE,
            counters=self.counters,
            on_fetched=lambda: self._inbox.put(None),
        )
        prefixes.files = folder.find
        prefixes.store.on_evicted = folder.put
        folder.start()
        folder.looked.wait(_LOOK_S)

    def _step(self, context: LlamaContext, batch: Batch, scheduler: Scheduler) -> None:
        """One turn: drain the inbox, drop the cancelled, admit, decode one batch, sample, deliver."""
        context.rearm()
        self._drain(scheduler)
        if self._closing.is_set():
            return
        self._watch.begin()
        for sequence in scheduler.cancelled():
            self._finish(context, scheduler, sequence, "cancelled")
        self._snapshots.clear()
        if self._folder is not None:
            self._take_fetched(self._folder, scheduler)
        while (follower := scheduler.rejoin()) is not None:
            self._take_over(context, follower)
        while (newcomer := scheduler.admit_one()) is not None:
            self._begin(newcomer)
            self._take_over(context, newcomer)
        self._running = tuple(scheduler.running)
        shares = scheduler.schedule()
        if shares:
            self._decode(context, batch, scheduler, self._look_ahead(shares, batch.n_max))
        self._stalled = not shares
        self._deliver()
        self._watch.end()

    def _drain(self, scheduler: Scheduler) -> None:
        """Takes what came in; waits for something when there is nothing to do."""
        if scheduler.idle:
            self._running = ()
            self._take(scheduler, self._inbox.get())
        elif self._stalled:
            # All who run wait for files.
            with suppress(queue.Empty):
                self._take(scheduler, self._inbox.get(timeout=1.0))
        while True:
            try:
                self._take(scheduler, self._inbox.get_nowait())
            except queue.Empty:
                return

    def _take(self, scheduler: Scheduler, item: Sequence | None) -> None:
        if item is None:
            return
        n_ctx, n_vocab = min(item.n_ctx, self.n_ctx), self.model.n_vocab
        foreign = next((token for token, _ in item.sampler.logit_bias if not 0 <= token < n_vocab), None)
        if 0 < item.n_prompt < n_ctx and foreign is None:
            scheduler.add(item)
            return
        # It would make the whole batch fail.
        self.counters.n_finished += 1
        item.state = SequenceState.FINISHED
        error = f"a prompt of {item.n_prompt} tokens does not fit a context of {n_ctx}"
        if foreign is not None:
            error = f"logit_bias names token {foreign}, and the vocabulary has {n_vocab}"
        self._outbox.append(SequenceFinished(item, time.perf_counter(), "", "error", error))

    def _begin(self, sequence: Sequence) -> None:
        spec = sequence.sampler
        if not spec.greedy and sequence.chain is None:
            sequence.chain = SamplerChain(spec)
        if spec.logit_bias:
            ids, values = zip(*spec.logit_bias, strict=True)
            sequence.bias = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
        if spec.penalises:
            sequence.penalties = Penalties(spec)
            for token in sequence.prompt[-spec.repeat_last_n :]:
                sequence.penalties.accept(token)
        if self._speculation is not None and self._draft_max(sequence):
            n_max = min(sequence.n_ctx, sequence.n_prompt + sequence.max_tokens)
            sequence.lookup = PromptLookup(sequence.ids, n_max=n_max)
        self._outbox.append(SequenceStarted(sequence, time.perf_counter(), sequence.slot))

    def _take_over(self, context: LlamaContext, sequence: Sequence) -> None:
        """Puts into the sequence's slot what its plan found of its beginning, and nothing else."""
        plan, prefixes, counters = sequence.plan, self._prefixes, self.counters
        if plan is None or plan.source is Source.AWAITED:
            return
        if plan.filed is not None:
            if self._folder is not None:
                self._folder.fetch(plan.filed)
            return
        sequence.plan = None
        slot = sequence.slot
        if plan.source is not Source.HELD:
            self._keep(context, slot, 0)
            context.forget(slot)
            prefixes.cut(slot, 0)
            blob, tokens = None, sequence.ids
            if plan.source is Source.COPIED:
                blob = self._snapshot(context, plan.from_slot)
                tokens = prefixes.held(plan.from_slot)
            elif plan.state is not None:
                blob, tokens = plan.state.blob, plan.state.tokens
                prefixes.store.touch(plan.state)
                counters.n_states_restored += 1
            begun = time.perf_counter()
            if blob is not None and context.restore(slot, blob) and context.last_position(slot) == len(tokens) - 1:
                prefixes.copied(slot, tokens)
                prefixes.costs.moved(len(tokens), time.perf_counter() - begun)
            elif plan.state is not None:
                # It would fail every time.
                context.forget(slot)
                prefixes.store.drop(plan.state)
                if self._folder is not None:
                    self._folder.forget(plan.state)
        else:
            self._keep(context, slot, plan.n)
        n = min(plan.n, prefixes.n_held(slot))
        if prefixes.n_held(slot) > n and not context.cut(slot, n):
            context.forget(slot)
            n = 0
        prefixes.cut(slot, n)
        sequence.n_past = sequence.n_cached = n
        counters.n_cached_tokens += n
        counters.n_prefix_hits += n > 0
        counters.n_prefix_refused += plan.n_refused > 0
        if prefixes.reuse.rule is ReuseRule.ENDS:
            # For the same prompt again, and for those that go on from it.
            sequence.marks = [sequence.n_prompt - 1]
        if plan.n_refused:
            # Others will begin like this too: the next one finds the state where the prompts part.
            sequence.marks = [plan.n + plan.n_refused, *sequence.marks]
        keeps = prefixes.store.budget_bytes > 0
        sequence.marks = [mark for mark in sequence.marks if keeps and mark >= MIN_SAVED and mark > n]

    def _take_fetched(self, folder: StateFolder, scheduler: Scheduler) -> None:
        """Puts the states that have come from files into the store; who waits for them makes a new plan."""
        for fetched in folder.fetched():
            if fetched.state is not None:
                n_tokens = len(fetched.state.tokens)
                self._prefixes.costs.fetched(n_tokens, fetched.seconds)
                cuttable = self._prefixes.reuse.rule is ReuseRule.ANYWHERE
                self._prefixes.store.put(fetched.state, cuttable=cuttable)
                self.counters.store_bytes = self._prefixes.store.n_bytes
            for sequence in scheduler.running:
                if sequence.filed is not None and sequence.filed.path == fetched.filed.path:
                    sequence.filed = None
        if folder.late():
            for sequence in scheduler.running:
                sequence.filed = None

    def _leave_states(self, folder: StateFolder, torn: set[int]) -> None:
        """Writes what the next start may go on from: what the slots hold, save for `torn`, and the store, the latest
        first. After a fault nothing, because it may be in the states."""
        context = self._context
        if self._died is not None or context is None:
            folder.close(0.0)
            return
        try:
            for slot in range(self.options.n_slots):
                if slot not in torn:
                    self._keep(context, slot, 0)
        except LlamaError as error:
            log.warning(f"not all of {self.name}'s prompts are kept: {error}", extra={"code": "prefix.not_kept"})
        for state in reversed(self._prefixes.store.states):
            folder.put(state, last=True)
        folder.close(_LEAVE_S)

    def _snapshot(self, context: LlamaContext, slot: int) -> npt.NDArray[np.uint8]:
        """A slot's state, taken once for all who copy it before the next decode."""
        found = self._snapshots.get(slot)
        if found is None:
            begun = time.perf_counter()
            found = self._snapshots[slot] = context.save(slot)
            self._prefixes.costs.moved(self._prefixes.n_held(slot), time.perf_counter() - begun)
        return found

    def _keep(self, context: LlamaContext, slot: int, n_kept: int) -> None:
        """Saves a slot's state if more than is worth its memory would be lost beyond the first `n_kept` tokens."""
        if self._prefixes.worth_saving(slot, n_kept):
            self._save(context, slot)
        self._snapshots.pop(slot, None)

    def _save(self, context: LlamaContext, slot: int) -> None:
        prefixes = self._prefixes
        if context.state_bytes(slot) > prefixes.store.budget_bytes:
            return
        prefixes.save(slot, self._snapshot(context, slot))
        self.counters.n_states_saved += 1
        self.counters.store_bytes = prefixes.store.n_bytes

    def _draft_max(self, sequence: Sequence) -> int:
        return self.options.draft_max if sequence.draft_max is None else sequence.draft_max

    def _look_ahead(self, shares: list[Share], n_batch: int) -> list[Share]:
        """The same step with guesses behind each sequence's token, where checking them should pay; else `shares`.

        Never beside a prompt: what is read there must not wait longer.
        """
        speculation = self._speculation
        if speculation is None or len(shares) * 2 > MAX_ROWS or shares[-1].sequence.state is not SequenceState.DECODE:
            return shares
        holds, shortest, least = 0.0, SURE_STREAK, speculation.least_streak
        for share in shares:
            lookup = share.sequence.lookup
            if lookup is not None and (streak := lookup.streak) >= lookup.need and streak >= least:
                holds += lookup.hold
                shortest = min(shortest, streak)
            else:
                shortest = 0
        if not holds or not speculation.may_pay(len(shares), holds, sure=shortest >= SURE_STREAK):
            return shares
        sequences = [share.sequence for share in shares]
        outlooks, n_max = [], n_batch // len(shares) - 1
        for each in sequences:
            lookup = each.lookup
            if lookup is None or lookup.streak < lookup.need:
                outlooks.append(Outlook(0.0, 0, 0))
            else:
                # Never more than have come as guessed already: who has just begun to repeat may as soon end.
                n_useful = min(self._draft_max(each), each.max_tokens - each.n_drawn - 1, lookup.streak)
                outlooks.append(Outlook(lookup.hold, n_useful, lookup.streak))
            # What only fills up stands in the context too.
            n_max = min(n_max, each.n_ctx - each.n_past - 1)
        n = speculation.choose(outlooks, n_max=n_max)
        if not n:
            return shares
        longer = []
        for share, each in zip(shares, sequences, strict=True):
            ahead = [] if each.lookup is None else each.lookup.guess(n)
            n_checked = max(0, min(n, self._draft_max(each), each.max_tokens - each.n_drawn - 1)) if ahead else 0
            tokens = [*share.tokens, *(ahead or share.tokens * n)]
            longer.append(Share(each, tokens, share.start, True, n_ahead=n, n_checked=n_checked))
        return longer

    def _decode(self, context: LlamaContext, batch: Batch, scheduler: Scheduler, shares: list[Share]) -> None:
        batch.clear()
        reads_only = shares[0].sequence.state is SequenceState.PREFILL  # those who decode come first
        draws_only = shares[-1].sequence.state is SequenceState.DECODE
        # llama.cpp evaluates in one go only what stands in neighbouring slots, in their order: out of order, each
        # sequence costs a step of its own.
        shares = sorted(shares, key=lambda share: share.sequence.slot)
        positions = [
            batch.add(
                share.tokens,
                start=share.start,
                slot=share.sequence.slot,
                draws=share.draws,
                every=share.n_ahead > 0,
            )
            for share in shares
        ]
        clock = self._clock
        begun = clock()
        rc = context.decode(batch)
        took_s = clock() - begun
        if rc == DECODE_ABORTED:
            # Nothing of an aborted batch is kept and no sequence has moved on: the next step drops the cancelled and
            # tries again.
            return
        if rc != DECODE_OK:
            self._make_room(context, scheduler, shares)
            return
        counters = self.counters
        counters.n_steps += 1
        now = time.perf_counter()
        prefixes = self._prefixes
        if reads_only:
            prefixes.costs.read(batch.n, took_s)
        self._snapshots.clear()
        n_drawing = n_drawn = 0
        for share, position in zip(shares, positions, strict=True):
            sequence = share.sequence
            sequence.n_past += len(share.tokens)
            prefixes.note(sequence.slot, share.start, share.tokens)
            if sequence.state is SequenceState.PREFILL:
                counters.n_prefill_tokens += len(share.tokens)
                if sequence.n_past in sequence.marks and not prefixes.is_stored(sequence.slot):
                    self._save(context, sequence.slot)
            if share.draws:
                n_drawing += 1
                n_drawn += self._draw_all(context, scheduler, share, position, now)
        if draws_only and self._speculation is not None:
            self._speculation.took(len(shares), shares[0].n_ahead, n_drawn, took_s)
        counters.n_decode_tokens += n_drawn
        counters.n_batch_sequences += n_drawing
        counters.max_batch_sequences = max(counters.max_batch_sequences, n_drawing)

    def _make_room(self, context: LlamaContext, scheduler: Scheduler, shares: list[Share]) -> None:
        """The KV cache is full: the youngest prompt is read again later; one alone cannot go on."""
        youngest = max((share.sequence for share in shares), key=lambda each: each.order)
        if len(shares) == 1:
            self._finish(
                context, scheduler, youngest, "error", "the KV cache is full: lower CTX_SIZE or WORKER_CONCURRENCY"
            )
        elif youngest.n_drawn == 0:
            context.forget(youngest.slot)
            self._prefixes.cut(youngest.slot, 0)
            scheduler.requeue(youngest)
        else:
            self._finish(context, scheduler, youngest, "length")

    def _draw_all(self, context: LlamaContext, scheduler: Scheduler, share: Share, position: int, now: float) -> int:
        """Draws at the share's known token, and at each guess behind it for as long as what was drawn was the guess.
        Returns how many were drawn.

        Every token is drawn by the sequence's own sampler from the logits behind the tokens before it, in order, with
        the penalties, the constraint and the random numbers that it would have met one step at a time. So the guesses
        change neither a greedy answer nor the distribution of a drawn one, and a seed gives the same text.
        """
        sequence, slot, n_ahead = share.sequence, share.sequence.slot, share.n_ahead
        end = share.start + len(share.tokens) - n_ahead
        sequence.n_drafted += share.n_checked
        self.counters.n_drafted += share.n_checked
        lookup = sequence.lookup
        # What is checked along with another's guesses says nothing of when to check.
        judged = lookup is not None and share.n_checked and lookup.streak >= lookup.need
        n_held = 0
        while True:
            sequence.n_past = end + n_held
            self._draw(context, scheduler, sequence, position - n_ahead + n_held, now)
            if sequence.state is SequenceState.FINISHED or n_held == share.n_checked:
                break
            if sequence.last_token != share.tokens[n_held - n_ahead]:
                break
            n_held += 1
            sequence.n_accepted += 1
            self.counters.n_accepted += 1
        if lookup is not None and judged:
            lookup.checked(share.n_checked, n_held)
        if n_ahead:
            # The end of a sequence may have emptied its slot already.
            prefixes = self._prefixes
            if prefixes.n_held(slot) > end + n_held:
                if not context.cut(slot, end + n_held):
                    raise LlamaError(f"the guesses in slot {slot} cannot be taken back")
                prefixes.cut(slot, end + n_held)
        return n_held + 1

    def _draw(self, context: LlamaContext, scheduler: Scheduler, sequence: Sequence, position: int, now: float) -> None:
        """Samples one token and ends the sequence where it ends."""
        model = self.model
        logits = context.logits(position)
        raw = None if sequence.n_logprobs is None else logits.copy()
        if sequence.bias is not None:
            ids, values = sequence.bias
            logits[ids] += values
        if sequence.ignore_eos:
            logits[model.eog] = -float("inf")
        if sequence.penalties is not None:
            sequence.penalties.apply(logits)
        token = int(logits.argmax())
        if not math.isfinite(logits[token]):
            # llama.cpp's draw aborts on these.
            self._finish(
                context, scheduler, sequence, "error", "the model computed no usable number: its file is damaged"
            )
            return
        if sequence.chain is not None:
            token = sequence.chain.draw(context, position)
        if sequence.constraint is not None:
            chain = sequence.chain
            redraw = (lambda: int(logits.argmax())) if chain is None else partial(chain.draw, context, position)
            try:
                token = sequence.constraint.choose(logits, token, redraw)
            except ConstraintFailedError as error:
                self._finish(context, scheduler, sequence, "error", f"the constraint cannot go on: {error}")
                return
        if sequence.penalties is not None:
            sequence.penalties.accept(token)
        if sequence.lookup is not None:
            sequence.lookup.append(token)
        sequence.state = SequenceState.DECODE
        sequence.last_token = token
        sequence.n_drawn += 1
        if model.is_eog(token):
            self._outbox.append(TokenEmitted(sequence, now, ""))
            self._finish(context, scheduler, sequence, "stop")
            return
        special = sequence.special or token in sequence.shown
        text, stopped = sequence.assembler.feed(model.piece(token, special=special))
        logprobs = None
        if raw is not None and sequence.n_logprobs is not None:
            logprobs = step_logprobs(
                raw, token, n_top=sequence.n_logprobs, piece=lambda each: model.piece(each, special=True)
            )
        self._outbox.append(TokenEmitted(sequence, now, text, logprobs))
        if stopped or (sequence.constraint is not None and sequence.constraint.finished):
            self._finish(context, scheduler, sequence, "stop")
        elif sequence.n_drawn >= sequence.max_tokens or sequence.n_past + 1 >= sequence.n_ctx:
            self._finish(context, scheduler, sequence, "length")

    def _finish(
        self,
        context: LlamaContext,
        scheduler: Scheduler,
        sequence: Sequence,
        reason: str,
        error: str | None = None,
    ) -> None:
        if sequence.slot >= 0:
            if reason == "error" or self._prefixes.reuse.rule is ReuseRule.OFF:
                context.forget(sequence.slot)
                self._prefixes.cut(sequence.slot, 0)
            self._prefixes.left(sequence.slot)
        scheduler.remove(sequence)
        if sequence.chain is not None:
            sequence.chain.close()
        self.counters.n_finished += 1
        self.counters.n_cancelled += reason == "cancelled"
        rest = sequence.assembler.finish() if reason != "error" else ""
        self._outbox.append(SequenceFinished(sequence, time.perf_counter(), rest, reason, error, *sequence.counts))

    def _end_all(self, scheduler: Scheduler | None) -> None:
        """The last act: everyone still here hears of the end. Trusts no state that a fault may have left half
        changed."""
        self._watch.stop()
        with self._gate:
            self._ended = True
        left = [] if scheduler is None else [*scheduler.running, *scheduler.waiting]
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                left.append(item)
        for sequence in left:
            self._outbox.append(self._farewell(sequence))
            if sequence.chain is not None:
                sequence.chain.close()
        self._running = ()
        self._deliver()

    def _farewell(self, sequence: Sequence) -> SequenceFinished:
        """The end of a sequence that an ended engine will not go on with."""
        self.counters.n_finished += 1
        self.counters.n_cancelled += self._died is None
        sequence.state, sequence.slot = SequenceState.FINISHED, -1
        rest = sequence.assembler.finish() if self._died is None else ""
        reason = "cancelled" if self._died is None else "error"
        return SequenceFinished(sequence, time.perf_counter(), rest, reason, self._died, *sequence.counts)

    def _deliver(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._post(self._tell, events)

    def _post(self, function: Callable[..., None], argument: object) -> None:
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(function, argument)
            except RuntimeError:
                # The loop closed between the check and the call: nobody is left to hear it.
                log.debug("the loop is closed", extra={"code": "engine.loop_closed", "model": self.name})


def _hand_out(events: list[SequenceEvent]) -> None:
    """On the loop: each event to its sequence's listener. One that fails costs the others nothing."""
    for event in events:
        try:
            event.sequence.listener(event)
        except Exception:
            log.exception("an event could not be delivered", extra={"code": "engine.listener_failed"})
