"""Check one family under one head: build it, train it for a step in several ways, compare with the reference."""

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import set_seed

import hf_rdrop

from .batches import CLASSES, ROWS, Rows, make_rows, stack, with_images
from .pairs import Pair
from .reference import Terms, terms_of
from .tiny_configs import tiny_config
from .training import ALPHA, Step, differs_between_passes, train, without_other_noise

PACKAGE = Path(hf_rdrop.__file__).parent
LANGUAGE_MODELS = ("masked LM", "causal LM", "seq2seq LM", "image-text-to-text", "speech seq2seq")
CLASSIFIERS = (
    "sequence classification",
    "token classification",
    "image classification",
    "video classification",
    "audio classification",
    "audio frame classification",
    "semantic segmentation",
    "visual question answering",
    "speaker embeddings",
)
LARGEST = 80_000_000  # parameters; a family that stays larger is not tiny
# Rates so small that nothing is dropped, though the passes are taken for different ones; else plain training.
QUIET: tuple[dict[str, Any], ...] = (
    {"rdrop_alpha": ALPHA, "rdrop_fused_head": "off", "rdrop_dropout": 1e-9},
    {"rdrop_alpha": ALPHA, "rdrop_fused_head": "off", "rdrop_insert_dropout": 1e-9},
    {"rdrop_alpha": 0.0, "rdrop_dropout": 0.0},
    {"rdrop_alpha": 0.0},
)
# What can be tried, in this order, where two passes are equal by default.
KNOBS: tuple[dict[str, float], ...] = (
    {},
    {"rdrop_dropout": 0.1},
    {"rdrop_insert_dropout": 0.1},
    {"rdrop_layer_drop": 0.3},
)
# What a model can be loaded with, where none of the arguments helps.
STOCHASTIC_DEPTH = {"drop_path_rate": 0.3, "layer_scale_init_value": 1.0}


class NotTried(Exception):
    """Says why a pair cannot be tried: no tiny model, or a batch that the plain Trainer cannot train on either."""


@dataclass
class Record:
    """What was found for one pair.

    Args:
        head, family, model_class: the pair.
        status: "right", "refused" (with R-Drop's own reason), "wrong", "error" or "not tried".
        rdrop, fused_head, trunk: of these parts: "right", "refused", "no" (does not apply) or a fault.
        dropout: "default", the knob that was needed, or "none".
        reasons: by part, why it was refused, wrong, or not tried.
        remarks: what a user should know besides.
        values: the figures that were compared.
    """

    head: str
    family: str
    model_class: str
    status: str = "right"
    rdrop: str = ""
    fused_head: str = "no"
    trunk: str = ""
    dropout: str = ""
    accumulation: str = ""
    alpha_zero: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def check_pair(pair: Pair) -> Record:
    """Make all checks of one pair."""
    record = Record(pair.head, pair.family, pair.model_class)
    try:
        model = build(pair)
        rows = make_rows(pair.head, model)
        if pair.head == "image-text-to-text":
            rows, plain = _with_images_or_without(model, rows, record)
        else:
            plain = _plain(model, rows)
    except Exception as error:
        record.status, record.reasons["not tried"] = "not tried", describe(error)
        return record
    try:
        _Checks(record, model, rows, plain).run()
    except Exception as error:  # of the checks themselves, or of the model where nothing is R-Drop's
        record.status, record.reasons["process"] = "error", describe(error)
        return record
    faults = {"wrong", "error"}
    parts = (record.rdrop, record.fused_head, record.trunk, record.accumulation, record.alpha_zero)
    if faults & set(parts):
        record.status = "error" if "error" in parts else "wrong"
    elif record.rdrop == "refused":
        record.status = "refused"
    return record


def build(pair: Pair, **settings: float) -> nn.Module:
    """Build a tiny model whose predictions differ, with every bias of its head nonzero.

    Args:
        pair: the family and its head.
        settings: entries of its configuration to be set, where it has them.
    """
    model_class = getattr(transformers, pair.model_class)
    config = tiny_config(pair.family)
    for name, value in settings.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if not isinstance(config, model_class.config_class):  # the class takes a part of it
        parts = [v for v in vars(config).values() if isinstance(v, model_class.config_class)]
        config = parts[0] if parts else config
    if pair.head in CLASSIFIERS:
        config.num_labels = CLASSES
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None or not 0 <= text.pad_token_id < 256:
        text.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if pair.head in ("causal LM", "masked LM") and hasattr(config, "is_decoder"):
        config.is_decoder = pair.head == "causal LM"
    set_seed(0)
    model = model_class(config)
    if (count := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise NotTried(f"{count:,} parameters in its smallest configuration")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                module.weight.normal_(0, 0.7 * module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.fill_(1.0)  # some families begin at next to nothing
    return model


def _with_images_or_without(model: nn.Module, rows: Rows, record: Record) -> tuple[Rows, Step]:
    """Train on images and text where that works here with the plain Trainer, else on text alone."""
    try:
        if found := with_images(rows, model):
            return found, _plain(model, found)
    except Exception as error:
        record.values["images"] = describe(error)
    record.remarks.append("tried on text alone")
    return rows, _plain(model, rows)


def _plain(model: nn.Module, rows: Rows) -> Step:
    step = train(model, rows, plain=True)
    if "loss" not in step.log:
        raise NotTried("the plain Trainer logs no loss")
    return step


class _Checks:
    """The checks of one pair, each of which writes its part of the record."""

    def __init__(self, record: Record, model: nn.Module, rows: Rows, plain: Step) -> None:
        self.record, self.model, self.rows, self.plain = record, model, rows, plain
        self.shifts = False
        self.knob: dict[str, float] = {}

    def run(self) -> None:
        record = self.record
        batch = stack(self.rows)
        by_default = differs_between_passes(self.model, batch, _scores)
        record.dropout = "default" if by_default else "none"
        self._part("alpha_zero", self._alpha_zero)
        full = self._rdrop()
        if full is None:
            return
        if record.head in LANGUAGE_MODELS:
            self._part("fused_head", lambda: self._fused_head(full))
        self._part("trunk", self._trunk)
        self._part("accumulation", self._accumulation)

    def _part(self, name: str, check: Any) -> None:
        """Run a check; what R-Drop refuses with a reason is no fault, any other exception is one."""
        try:
            setattr(self.record, name, check() or "right")
        except Wrong as fault:
            setattr(self.record, name, "wrong")
            self.record.reasons[name] = str(fault)
        except Exception as error:
            setattr(self.record, name, "refused" if is_refusal(error) else "error")
            self.record.reasons[name] = describe(error)

    # ---- R-Drop itself ----

    def _rdrop(self) -> Step | None:
        found: list[Step] = []
        refusals: list[str] = []
        record, by_default = self.record, self.model
        for knob in (*KNOBS, STOCHASTIC_DEPTH):
            self.knob = {} if knob is STOCHASTIC_DEPTH else knob
            if knob is STOCHASTIC_DEPTH:
                if not hasattr(self.model.config, "drop_path_rate"):
                    break
                self.model = build(Pair(record.head, record.family, record.model_class), **knob)

            def check() -> None:
                step = train(self.model, self.rows, rdrop_alpha=ALPHA, rdrop_fused_head="off", **self.knob)
                self._compare("rdrop", step)
                found.append(step)

            self._part("rdrop", check)
            if self.record.rdrop != "refused":
                break
            refusals.append(self.record.reasons["rdrop"])
        if self.record.rdrop == "refused":
            self.model = by_default
            # Where nothing is random by default, what is refused with it counts.
            other = [reason for reason in refusals if not reason.startswith("Nothing in this model is stochastic")]
            self.record.reasons["rdrop"] = (other or refusals)[0]
        else:
            if self.record.rdrop == "right":
                self.record.reasons.pop("rdrop", None)
            if knob:
                self.record.dropout = next(iter(knob))
        return found[0] if found and self.record.rdrop == "right" else None

    def _compare(self, part: str, step: Step) -> None:
        """Compare the logged loss and its terms with the reference."""
        log = step.log
        ce, kl = log["ce_loss"], log["kl_loss"]
        self._close("loss", log["loss"], ce + ALPHA / 2 * kl)
        own, count = 0.0, 0
        sums = Terms(0.0, 0.0, 0)
        for inputs, outputs in step.forwards:
            self.shifts = self._measure_shift(outputs, inputs)
            terms = terms_of(outputs, inputs, self.shifts)
            if terms is None:
                raise Wrong("R-Drop trains on what has no reference here")
            sums = Terms(*(a + b for a, b in zip(sums, terms, strict=True)))
            own += float(_loss(outputs)) * terms.items
            count += terms.items
        n = max(sums.items, 1)
        self.record.values[part] = {"ce": ce, "kl": kl, "reference ce": sums.ce / n, "reference kl": sums.kl / n}
        self._close("ce_loss beside the model's own loss", ce, own / n)
        self._close("kl_loss", kl, sums.kl / n)
        if not _is_close(ce, sums.ce / n):
            self._remark("the model's loss is not the plain cross-entropy of its logits; `ce_loss` is the model's")
        if kl < 1e-7:
            self._remark("the passes hardly differ")

    def _measure_shift(self, outputs: Any, inputs: dict[str, Any]) -> bool:
        """Find out which of both readings of the labels the model's loss fits."""
        labels = inputs.get("labels")
        if self.record.head not in LANGUAGE_MODELS or labels is None or labels.dim() != 2:
            return False
        readings = [terms_of(outputs, inputs, shifts) for shifts in (False, True)]
        if any(reading is None or not reading.items for reading in readings):
            return False
        own = float(_loss(outputs)) - _auxiliary(outputs, self.model)
        away = [abs(own - reading.ce / reading.items) for reading in readings if reading is not None]
        return away[1] < away[0]

    # ---- The parts ----

    def _alpha_zero(self) -> str | None:
        step = train(self.model, self.rows, rdrop_alpha=0.0)
        plain, ours = self.plain.log["loss"], step.log["loss"]
        if plain == ours and _equal_gradients(step, self.plain):
            return None
        own = float(_loss(step.forwards[0][1]))
        if _is_close(ours, own, 1e-5):
            self.record.values["alpha 0"] = {"Trainer": plain, "model's mean": own}
            self._remark("the plain Trainer's loss is not the model's mean, which `rdrop_alpha=0` gives")
            return None
        raise Wrong(f"alpha 0 gives the loss {ours:.7g}, Trainer {plain:.7g}, and the model's mean is {own:.7g}")

    def _fused_head(self, full: Step) -> str | None:
        again = train(self.model, self.rows, rdrop_alpha=ALPHA, rdrop_fused_head="off", **self.knob)
        if not _is_close(again.log["loss"], full.log["loss"], 1e-5):
            train(self.model, self.rows, rdrop_alpha=ALPHA, rdrop_fused_head="on", **self.knob)  # or a refusal
            self._remark("draws its seeds by itself: the fused head was not compared")
            return "no"
        step = train(self.model, self.rows, rdrop_alpha=ALPHA, rdrop_fused_head="on", **self.knob)
        for name in ("loss", "ce_loss", "kl_loss"):
            self._close(f"{name} of the fused head beside full logits", step.log[name], full.log[name])
        self._close_gradients("the fused head", step, full)
        return None

    def _trunk(self) -> None:
        arguments = {"rdrop_alpha": ALPHA, "rdrop_fused_head": "off", "rdrop_shared_layers": 1, **self.knob}
        try:
            step = train(self.model, self.rows, **arguments)
        except ValueError as error:
            if not is_refusal(error) or "layerdrop" not in str(error):
                raise
            self._remark("shared layers are refused at the default layerdrop, and were tried at layerdrop 0")
            step = train(without_other_noise(self.model), self.rows, **arguments)
        self._compare("trunk", step)

    def _accumulation(self) -> str | None:
        if any("BatchNorm" in type(module).__name__ for module in self.model.modules()):
            self._remark("batch normalisation: the loss depends on how rows are divided over batches")
            return "no"
        model = without_other_noise(self.model)
        for arguments in QUIET:
            try:
                one, other = (train(model, self.rows, seed=seed, **arguments) for seed in (0, 1))
                break
            except ValueError as error:
                if arguments is QUIET[-1] or not is_refusal(error):
                    raise
        if not _is_close(one.log["loss"], other.log["loss"], 1e-5) or self._gradient_away(other, one):
            self._remark("random beyond dropout: accumulation was not compared")
            return "no"
        four = train(model, self.rows, batches=4, **arguments)
        if _mixes_rows(one, four):
            self._remark("a row's logits depend on the other rows of its batch: accumulation was not compared")
            return "no"
        self._close("loss of 4 batches of 2 beside 1 of 8", four.log["loss"], one.log["loss"])
        self._close_gradients("4 batches of 2", four, one)
        return None

    # ---- Comparing ----

    def _close(self, what: str, value: float, right: float) -> None:
        if not _is_close(value, right):
            raise Wrong(f"{what}: {value:.7g}, right is {right:.7g}")

    def _close_gradients(self, what: str, step: Step, right: Step) -> None:
        if found := self._gradient_away(step, right):
            raise Wrong(f"gradient with {what}: {found}")

    def _gradient_away(self, step: Step, right: Step) -> str | None:
        """Name the first parameter whose gradient is another one."""
        largest = max((float(g.abs().max()) for g in right.gradients.values() if g.numel()), default=0.0)
        for name, gradient in right.gradients.items():
            if not gradient.numel():
                continue
            other, own = step.gradients.get(name), float(gradient.abs().max())
            away = float((gradient - (0 if other is None else other)).abs().max())
            if not away <= 1e-5 + 2e-3 * max(own, 1e-2 * largest):
                return f"{name} is {away:.3g} away (its largest entry is {own:.3g})"
        return None

    def _remark(self, remark: str) -> None:
        if remark not in self.record.remarks:
            self.record.remarks.append(remark)


class Wrong(Exception):
    """Says which value is wrong."""


def _is_close(value: float, right: float, tolerance: float = 1e-3) -> bool:
    return abs(value - right) <= 1e-6 + tolerance * abs(right)  # (nan is never close)


def _mixes_rows(one: Step, four: Step) -> bool:
    """Tell whether the logits of a row change with the rows beside it, as where experts have a capacity."""
    whole = _scores(one.forwards[0][1])
    parts = [_scores(outputs) for _, outputs in four.forwards]
    if whole is None or any(part is None for part in parts):
        return False
    passes = len(whole) // ROWS
    rows = torch.cat([part[: len(part) // passes] for part in parts if part is not None])
    if rows.shape != whole[: len(rows)].shape:
        return False
    away = (rows - whole[: len(rows)]).abs().nan_to_num(0.0)
    return float(away.max()) > 1e-3 * float(whole[whole.isfinite()].abs().max())


def _equal_gradients(step: Step, other: Step) -> bool:
    return step.gradients.keys() == other.gradients.keys() and all(
        torch.equal(g, other.gradients[name]) for name, g in step.gradients.items()
    )


def _loss(outputs: Any) -> Tensor:
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss.detach().mean()


def _scores(outputs: Any) -> Tensor | None:
    return next((outputs[name] for name in ("logits", "start_logits", "reconstruction") if name in outputs), None)


def _auxiliary(outputs: Any, model: nn.Module) -> float:
    aux = outputs.get("aux_loss")
    config: Any = model.config.get_text_config()
    return 0.0 if aux is None else float(aux) * getattr(config, "router_aux_loss_coef", 0.0)


def is_refusal(error: BaseException) -> bool:
    """Tell R-Drop's own refusal, a ValueError raised in its code, from whatever else goes wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and PACKAGE in Path(frames[-1].filename).parents


def describe(error: BaseException) -> str:
    """Write an error in a line, with its place unless it is R-Drop's own refusal."""
    text = " ".join(str(error).split())[:300]
    if is_refusal(error) or isinstance(error, NotTried):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"
