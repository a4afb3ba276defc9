"""Steps of a training, each made the fastest way that is known to be right.

The model's own call is always right. Two shortcuts are taken where they are proved to agree with
it, for this editor: the head cut to the tokens that have a target (`head_cut`; to rounding, and not
where the references' numbers are kept), and steps that are recorded once and run again
(`recording`; bit for bit).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace_fast.editor import memory
from grace_fast.editor.context import EditContext
from grace_fast.editor.program import Program
from grace_fast.editor.recording import Recording, Unrecordable
from grace_fast.editor.training import Tried
from grace_fast.editor.trial import Trial

TRIES = 2  # to record a step: the first call of a model may note things in it
# Of a loss of single precision, between products of other shapes. Of less precision no head is cut.
SAME = 1e-5


class Steps:
    """The steps of one trial.

    is_checked: its rows were compared with how they are alone; own: so many steps at first are the
    model's own, for a shortcut costs some before it saves any.
    """

    def __init__(self, context: EditContext, trial: Trial, is_checked: bool, own: int = 0) -> None:
        self._shortcuts, self._trial, self._own = context.shortcuts, trial, own
        self.is_checked = is_checked
        self._may_cut = context.settings.semantics == "paper" and trial.can_cut
        self._is_proved = False  # the cut, and for this trial
        self._program: Program | None = None
        self._tries = TRIES
        self._judged: tuple[Tensor, Tried] | None = None  # the last
        self.is_own = True  # every step so far was the model's own call

    def judge(self, values: Tensor) -> Tried:
        """Try values [R, V] by the model's own call."""
        self._shortcuts.taken["model"] += 1
        made = self._trial.by_model(values, self.is_checked)
        self.is_checked = True
        self._judged = values.detach().clone(), made.detached()
        return made

    @torch.no_grad()
    def judged(self, values: Tensor) -> Tried:
        """Return the same without a graph, as it is known where they were the last to be judged."""
        if self._judged is not None and torch.equal(self._judged[0], values):
            return self._judged[1]
        return self.judge(values)

    def step(self, values: Tensor) -> Tried:
        """Try values [R, V] the fastest way.

        Raises: as `Trial.by_model`.
        """
        if not torch.is_grad_enabled():  # the last value is judged
            return self.judge(values)
        if self._program is not None:
            return self._replayed(values, self._program)
        if self._own > 0:
            self._own -= 1
            return self.judge(values)
        if self._may_cut and self._shortcuts.cuts and not self._is_proved:
            self._prove_cut(values)
        may_record = self._shortcuts.records and self._tries > 0 and self.is_checked
        if may_record and self._trial.prefix.is_kept and values.device.type == "cpu":
            self._tries -= 1
            if self._trial.prefix.is_alone:
                return self._recorded(values)
        return self._made(values)

    def _made(self, values: Tensor) -> Tried:
        """Make a step by calls of modules."""
        if not self._is_proved or not self._shortcuts.cuts:
            return self.judge(values)
        made = self._trial.by_cut(values)
        if made is None:
            self._shortcuts.cuts = False
            return self.judge(values)
        self.is_own = False
        self._shortcuts.taken["cut"] += 1
        return made

    @torch.no_grad()
    def _prove_cut(self, values: Tensor) -> None:
        """Compare what a cut leaves with the model, once an editor; check the rows of a batch.

        Raises: StandsAlone.
        """
        if not (self._shortcuts.cut_is_proved and self.is_checked):
            own, made = self.judge(values), self._trial.by_cut(values)
            near = made is not None and is_near(made.losses, own.losses, SAME)
            self._shortcuts.cuts = self._shortcuts.cut_is_proved = near
        self._is_proved = self._shortcuts.cuts

    def _recorded(self, values: Tensor) -> Tried:
        """Make a step, and a program of it where that can be."""
        prefix, leaf = self._trial.prefix, values.detach().requires_grad_()
        recording, before = Recording(leaf), prefix.trace()
        try:
            made = self._run_in(recording, leaf)
        except (MemoryError, RuntimeError) as error:
            if not memory.has_ended(error):
                raise
            self._tries, made = 0, None
        if made is None:
            return self._made(values)
        if not (prefix.is_kept and prefix.is_traceless(before)):
            self._shortcuts.records = self._tries > 0
            return made.detached()
        try:
            self._program = recording.program([each for each in made if each is not None])
            self._tries = 0
        except Unrecordable:
            self._shortcuts.records = False
        return made.detached()

    def _run_in(self, recording: Recording, leaf: Tensor) -> Tried | None:
        """Make a step that is recorded from where values are written; None: it has no gradients."""
        self._trial.telling(recording.start)
        try:
            made = self._made(leaf)
            if not made.losses.requires_grad:
                return None
            (gradients,) = torch.autograd.grad(made.losses.sum(), [leaf], allow_unused=True)
        finally:
            recording.stop()
            self._trial.telling(None)
        return None if gradients is None else made._replace(gradients=gradients)

    def _replayed(self, values: Tensor, program: Program) -> Tried:
        """Make a step by its program, where one of its kind was what the model computes."""
        try:
            if program.kind not in self._shortcuts.proved:
                return self._proving(values, program)
            made = program.run(values)
        except (MemoryError, RuntimeError) as error:
            if not memory.has_ended(error):
                raise
            self._program = None
            return self._made(values)
        self.is_own = False
        self._shortcuts.taken["replay"] += 1
        return _tried(made)

    def _proving(self, values: Tensor, program: Program) -> Tried:
        """Make a step by calls, and compare the program with it, bit for bit."""
        leaf = values.detach().clone().requires_grad_()
        own = self._made(leaf)
        (gradients,) = torch.autograd.grad(own.losses.sum(), [leaf])
        own = own.detached()._replace(gradients=gradients)
        made = _tried(program.run(values))
        if all(_is_same(one, two) for one, two in zip(made, own, strict=True)):
            self._shortcuts.proved.add(program.kind)
        else:
            self._shortcuts.records, self._program = False, None
        return own


def _tried(made: list[Tensor]) -> Tried:
    losses, correct, *margins, gradients = made
    return Tried(losses, correct, margins[0] if margins else None, gradients)


def is_near(one: Tensor, two: Tensor, near: float) -> bool:
    """Tell whether losses are the same but for so much of them, or of 1."""
    return torch.allclose(one, two.to(one), rtol=near, atol=near, equal_nan=True)


def _is_same(one: Tensor | None, two: Tensor | None) -> bool:
    """Tell whether tensors are equal, not-a-numbers included."""
    if one is None or two is None or one.dtype != two.dtype:
        return one is two
    if one.is_floating_point():
        return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)
    return torch.equal(one, two)
