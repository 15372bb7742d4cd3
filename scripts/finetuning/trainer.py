"""Additions of the scripts to the Trainer: refusals that leave no trace, ends that say how to go on, whole results."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from finetuning.command_line import closest
from finetuning.results import LAST_RESULT_FILE, read_json, remove_results, write_file, write_json
from finetuning.run import RESUME_OPTION
from hf_rdrop import measure_consistency
from hf_rdrop.cards.card import check_evidence
from hf_rdrop.checkpoints.integrity import CheckpointError, how_to_go_on, why_not_written
from hf_rdrop.consistency import check_measurable
from hf_rdrop.sigterm import STATUS, SaveOnSigterm

try:
    import resource
except ImportError:  # Windows
    resource = None


def padding_multiple(args: TrainingArguments) -> int | None:
    """Lengths that are a multiple of 8 are faster on GPUs at half precision, and only slower elsewhere."""
    return 8 if (args.fp16 or args.bf16) and args.device.type == "cuda" else None


@dataclass
class ReportArguments:
    """Arguments on what a run reports beside its scores."""

    consistency_samples: int = field(
        default=0,
        metadata={
            "help": "Draw N sub-models by dropout on the validation data, and compare dropout off with them and with "
            "their ensemble: eval_consistency_* (KL divergences in nats: kl_between sub-models, kl_to_off from them "
            "to dropout off, kl_ensemble from their ensemble to it; of each score: _off, _sub and _std over "
            "sub-models, _ensemble) and consistency.json with the curves over 1 to N. 0: not measured."
        },
    )
    card_comparison: list[str] | None = field(
        default=None,
        metadata={
            "help": "A comparison.json of compare.py, whose figures the model card shows, and if it has several tasks "
            "of which none is named as the data set or --output_dir is, the name of the task."
        },
    )

    def __post_init__(self) -> None:
        if self.card_comparison and len(self.card_comparison) > 2:
            raise ValueError(
                f"--card_comparison takes a comparison.json and the name of a task, got {self.card_comparison}."
            )
        if self.consistency_samples < 0 or self.consistency_samples == 1:
            raise ValueError(
                f"--consistency_samples must be 0 or at least 2, as sub-models are compared with each other; got "
                f"{self.consistency_samples}."
            )


_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def _check_best_metric(args: TrainingArguments, names: Iterable[str]) -> None:
    """Refuse a metric that no evaluation will have, before the first one is over."""
    wanted, names = args.metric_for_best_model, ["loss", *names]
    if wanted and wanted.removeprefix("eval_") not in (*names, *_SPEED):
        raise ValueError(
            f"--metric_for_best_model {wanted}: the evaluation of this run has no such metric"
            f"{closest(wanted, names)}. It has: {', '.join(names):.300}."
        )


class ScriptMixin:
    """Additions of the scripts to any Trainer: rows in a known order, and no trace of a run that was refused.

    - Evaluation and prediction keep the order of the rows (length grouping would reorder predictions as well), and
      drop the rows that fill up the last batch when there are several processes.
    - What cannot work is refused before the first step, without leaving an output folder behind.
    - SIGTERM saves a checkpoint and stops (`SaveOnSigterm`); a full disk is told with the last whole checkpoint.
    - With `consistency_samples`, dropout off is compared with so many sub-models (`run_consistency`).
    - `metric_names` are those that an evaluation will have: --metric_for_best_model must be among them.
    - `card` are the arguments of `create_model_card`; what cannot be shown is refused here.
    """

    resume_option = RESUME_OPTION

    def __init__(
        self,
        *,
        args: TrainingArguments,
        card: dict[str, Any],
        consistency_samples: int = 0,
        metric_names: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._own_folder = not Path(args.output_dir).exists()
        self.card, self.consistency_samples, self.consistency = card, consistency_samples, {}
        try:
            check_evidence(args, **card)
            if metric_names is not None:
                _check_best_metric(args, metric_names)
            super().__init__(args=args, **kwargs)
            if args.do_train:
                self.check_setup()
            if consistency_samples:
                self._check_consistency()
        except Exception:
            self._leave_nothing_behind(args)
            raise

    def _check_consistency(self) -> None:
        if not self.args.do_eval:
            raise ValueError("--consistency_samples measures on the validation data: give --do_eval too.")
        if self.args.world_size > 1:
            raise ValueError(
                f"--consistency_samples was given to {self.args.world_size} processes, each of which would see a part "
                "of the validation data only. Leave it out, and measure the saved model in one process: with "
                "--do_eval alone, or with consistency.py."
            )
        with self.sub_models():
            check_measurable(self.model, self.consistency_samples)

    def _leave_nothing_behind(self, args: TrainingArguments) -> None:
        folder = Path(args.output_dir)
        if self._own_folder and args.should_save and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _get_eval_sampler(self, *args: Any, **kwargs: Any) -> None:
        return None  # in the order of the rows

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer sets one that keeps filling rows
        return super().evaluation_loop(*args, **kwargs)

    def run_training(self, checkpoint: str | None) -> dict[str, float]:
        """Train, save the model, and return the training metrics."""
        progress, stop = _RunProgress(), SaveOnSigterm(RESUME_OPTION)
        self.add_callback(progress)
        self.add_callback(stop)
        if on_gpu := self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.process_time()
        try:
            metrics = self.train(resume_from_checkpoint=checkpoint).metrics
            self.save_model()
        except CheckpointError:
            raise
        except Exception as error:
            self._explain(error, progress.stepped, stop.requested)
            raise
        finally:
            stop.restore()
        # Processor seconds tell what a run costs also where other processes slow it down. On a CPU the peak is that of
        # the whole process.
        cost = {"train_cpu_seconds": time.process_time() - started}
        if on_gpu:
            cost["train_peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        elif resource is not None:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            cost["train_peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return {**metrics, **cost, "train_samples": len(self.train_dataset)}

    def _explain(self, error: Exception, stepped: bool, signalled: bool) -> None:
        """Turn an error of training into what to do about it, where there is something to say."""
        folder = Path(self.args.output_dir)
        if signalled:  # it reached the processes that load the data, too
            print(f"SIGTERM: the step was not finished. {how_to_go_on(folder, RESUME_OPTION)}", file=sys.stderr)
            raise SystemExit(STATUS) from error
        if (reason := why_not_written(error, folder)) is not None:
            go_on = how_to_go_on(folder, RESUME_OPTION)
            raise CheckpointError(f"{folder} cannot be written: {reason}. {go_on}") from error
        if stepped and isinstance(error, (ValueError, OSError)):
            raise RuntimeError(
                f"training failed at step {self.state.global_step}; after removing the cause, go on from the last "
                "checkpoint, if there is one, with --resume_from_checkpoint last"
            ) from error  # with its traceback, as it need not be the user's
        if not stepped:
            self._leave_nothing_behind(self.args)

    def run_consistency(self, dataset: Any, compute_metrics: Any = None, name: str = "validation") -> dict[str, float]:
        """Metrics `eval_consistency_*` of the model on a data set; nothing unless `consistency_samples` are wanted.

        Args:
            dataset: rows with labels.
            compute_metrics: further scores, as `hf_rdrop.measure_consistency` takes them.
            name: of the data set in consistency.json, which `finish` writes.
        """
        if not self.consistency_samples:
            return {}
        with self.accelerator.autocast(), self.sub_models():
            found = measure_consistency(
                self.model,
                self.get_eval_dataloader(dataset),
                self.consistency_samples,
                seed=self.args.seed,
                compute_metrics=compute_metrics,
            )
        self.consistency[name] = found.to_dict()
        return found.metrics("eval_consistency")

    def finish(self, results: dict[str, dict[str, Any]], files: dict[str, str] | None = None) -> dict[str, Any]:
        """Write the result files, all_results.json last, and the model card; push to the Hub if asked to.

        Args:
            results: metrics by `train`, `eval` and `predict`.
            files: further files, text by name (predictions).

        Returns:
            All metrics of this run together.
        """
        folder, combined = Path(self.args.output_dir), {}
        for split, metrics in results.items():
            self.log_metrics(split, metrics)
            combined.update(metrics)
        if self.is_world_process_zero():
            for name, text in (files or {}).items():
                write_file(folder / name, text)
            if self.consistency:
                write_json(folder / "consistency.json", self.consistency)
            for split, metrics in results.items():
                write_json(folder / f"{split}_results.json", metrics)
            if self.args.do_train:
                write_file(folder / "trainer_state.json", lambda path: self.state.save_to_json(str(path)))
            earlier = {} if self.args.do_train else read_json(folder / LAST_RESULT_FILE)
            write_json(folder / LAST_RESULT_FILE, {**earlier, **combined})
        card = {**self.card, "consistency": self.consistency or None}
        if self.args.push_to_hub:
            self.push_to_hub(**card)
        elif self.args.do_train:
            self.create_model_card(**card)
        return combined


class _RunProgress(TrainerCallback):
    """Takes away the results of an earlier part of the run when training goes on; notes that a step was made."""

    stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            remove_results(Path(args.output_dir))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped = True
