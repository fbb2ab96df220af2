"""Which mistakes the tests notice: `python tests/mutations.py [WORD …]`

Each entry of MISTAKES is one that somebody could make, as a small patch, with the tests that should
fail. They are made one at a time, each in a copy of the project, on all cores. What is known is kept
in out/mutations.json, so that a run that was stopped goes on where it was; an edit to the code or to
the tests makes it unknown again. With words only the entries that mention all of them are tried. The
run ends with the survivors, mistakes that nobody noticed, and exits with 1 if there are any.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDERS = ("extra", "experiments", "tests", "docs")
RESULTS = ROOT / "out" / "mutations.json"
PATIENCE = 600  # seconds: a mistake that hangs is noticed, too
PROCESSES = multiprocessing.get_context("forkserver")
CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"


class Mutation(NamedTuple):
    file: str
    what: str  # the mistake, in words
    old: str  # occurs once in the file …
    new: str  # … and becomes this
    tests: str  # of which at least one should fail, as pytest names them, below tests/

    def applied(self) -> str:
        """The file's text with the mistake. Raises ValueError unless the patch fits once."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.file}, {self.what}: the patch fits {count} times")
        return text.replace(self.old, self.new)


# fmt: off
MISTAKES = [
    # What was once asked for, printed or reported wrongly, and nobody noticed
    ("data.py", "a micro-batch may exceed its budget", "if all(load <= budget or len(bins[i]) == 1 for load, i in heap):", "if all(load <= 2 * budget or len(bins[i]) == 1 for load, i in heap):", "test_data_path.py::test_packing_takes_as_few_micro_batches_as_the_rule_allows"),
    ("data.py", "the retry of the packing is never taken", "if all(load <= budget or len(bins[i]) == 1 for load, i in heap):", "if heap:", "test_data_path.py::test_packing_takes_as_few_micro_batches_as_the_rule_allows"),
    ("dpo.py", "weight decay on the norms, too", 'if p.dim() < 2], "weight_decay": 0.0}', 'if p.dim() < 2], "weight_decay": weight_decay}', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[weight_decay=3.0]"),
    ("train.py", "with --max_steps the schedule still runs over all epochs", "dpo.schedule(s.lr_schedule, s.warmup_steps, step, steps)", "dpo.schedule(s.lr_schedule, s.warmup_steps, step, epochs * per_epoch)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[max_steps=2]"),
    ("train.py", "the order of the data does not depend on --seed", "s.seed if s.shuffle else None", "0 if s.shuffle else None", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[seed=1]"),
    ("train.py", "SFT trains on --data though --sft_data is given", '("sft", s.sft_data or s.data,', '("sft", s.data or s.sft_data,', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[sft_data=sft2]"),
    ("train.py", "wandb gets SFT and DPO under the same names", 'self.wandb.log({f"{stage}/{name}": value', 'self.wandb.log({f"{name}": value', "test_metrics.py::test_weights_and_biases_gets_each_row"),
    ("train.py", "evaluation rows are missing in wandb", "        if self.wandb:\n", '        if self.wandb and "eval/loss" not in row:\n', "test_metrics.py::test_weights_and_biases_gets_each_row"),
    ("sample.py", "the nucleus is of probabilities at temperature 1", "    probabilities = logits.softmax(-1)\n    if top_p < 1:\n        ordered, index = probabilities.sort(descending=True)\n", "    probabilities = logits.softmax(-1)\n    if top_p < 1:\n        ordered, index = (logits * temperature).softmax(-1).sort(descending=True)\n", "test_sample_flags.py::test_frequencies_are_those_of_a_plain_sampler"),
    ("extra/reward.py", "the margin is printed with the wrong sign", "mean margin {mean['rewards/margins']:.4f}", "mean margin {-mean['rewards/margins']:.4f}", "test_sample_flags.py::test_scores_of_rows_of_all_kinds"),
    ("extra/reward.py", "β is that of the reference's run", 'setting(args.checkpoint, "beta"', 'setting(args.compare, "beta"', "test_sample_flags.py::test_beta_is_given_or_of_the_checkpoint_or_a_tenth"),
    ("experiments/reviews.py", "the report's KL is of the reference's samples", 'for name, model in (("SFT", reference), ("DPO", policy)):', 'for name, model in (("DPO", policy), ("SFT", reference)):', "test_reports.py::test_every_figure_of_the_report_is_a_plain_sum"),
    ("extra/conversations.py", "a quoted Human: inside a turn opens a turn", 're.split(r"(?:\\A|\\n\\n)(Human|Assistant): ?", text)', 're.split(r"\\s*(Human|Assistant): ?", text)', "test_data_path.py::test_quoted_turns_open_none"),
    ("experiments/reviews.py", "the built-in labels are deterministic", "noise = 0.0 if deterministic else rng.logistic()", "noise = 0.0", "test_reviews.py::test_grammar_labels_and_acceptance"),
    # Settings of train.py
    ("train.py", "DPO is evaluated on what it trains on", '("eval pairs", s.eval_data, "preferences", s.epochs)', '("eval pairs", s.eval_data and s.data, "preferences", s.epochs)', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[eval_data=eval2]"),
    ("train.py", "prompt and total length are handed over in the wrong order", "examples, tokenizer, s.max_length, s.max_prompt_length", "examples, tokenizer, s.max_prompt_length, s.max_length", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[max_length=15]"),
    ("train.py", "--vocab_size is not handed to the tokenizer's training", 'run.out / "encoded", s.vocab_size)', 'run.out / "encoded", Settings.vocab_size)', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[vocab_size=316]"),
    ("train.py", "the DPO stage trains at SFT's rate", "loss_of, s.epochs, s.learning_rate, run)", "loss_of, s.epochs, s.sft_learning_rate, run)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[learning_rate=0.001]"),
    ("train.py", "the SFT stage runs DPO's epochs", "dpo.sft_loss, s.sft_epochs, s.sft_learning_rate", "dpo.sft_loss, s.epochs, s.sft_learning_rate", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[sft_epochs=1]"),
    ("train.py", "the last, smaller batch of an epoch is dropped", "math.ceil(len(train) / s.batch_size)", "max(1, len(train) // s.batch_size)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[batch_size=6]"),
    ("train.py", "every epoch has the order of the first", "data.order_of(step // per_epoch, len(train), s.seed if s.shuffle else None)", "data.order_of(0, len(train), s.seed if s.shuffle else None)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "--shuffle=false is ignored", "s.seed if s.shuffle else None)", "s.seed)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[shuffle=false]"),
    ("train.py", "a new model is initialised without the seed", "init_weights(s.seed)", "init_weights(0)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[seed=1]"),
    ("train.py", "adapters are initialised without the seed", "lora.add(model, s.lora_rank, s.seed)", "lora.add(model, s.lora_rank, 0)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[seed=1-again-again]"),
    ("train.py", "a step's gradient is divided by the batch size, also where the last batch is smaller", '(len(examples) if stage == "dpo" else', '(s.batch_size if stage == "dpo" else', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "SFT divides by all tokens of the stream, prompts included", "else train.targets(examples))", "else train.lengths[examples].sum())", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "--weight_decay is not handed to the optimizer", "dpo.make_optimizer(model, s.optimizer, s.weight_decay)", "dpo.make_optimizer(model, s.optimizer)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[weight_decay=3.0]"),
    ("train.py", "the β of the reward that is logged is right, that of the loss is the default", '"beta": s.beta, "sft_weight"', '"beta": Settings.beta, "sft_weight"', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[beta=2.0]"),
    ("train.py", "--sft_weight does not reach the loss", '"sft_weight": s.sft_weight}\n', '"sft_weight": Settings.sft_weight}\n', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[sft_weight=0.7]"),
    ("train.py", "the options of the loss do not reach it", "run.mean_logratio, **s.options}", "run.mean_logratio}", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[label_smoothing=0.2] test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[gamma=0.3]"),
    ("train.py", "an option's flag is overruled by the loss's default", "known.pop(name, default) for name, default", "(known.pop(name, default), default)[1] for name, default", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[label_smoothing=0.2]"),
    ("train.py", "the last step is evaluated only with --eval_every", "(step in (0, steps) or (s.eval", "(step == 0 or (s.eval", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "the state of a stage's last step is saved too", "first < step < steps:", "first < step:", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[save_every=2] test_metrics.py::test_the_last_two_states_are_kept"),
    ("train.py", "the last steps of a stage are not logged unless they are due", "done % s.log_every == 0 or done == steps:", "done % s.log_every == 0:", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[log_every=4]"),
    ("train.py", "sums of a row are not cleared after it", "            totals.clear()\n", "", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[log_every=4] test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "steps of evaluation count as time of training", "        run.since += time.perf_counter() - paused\n", "", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[eval_every=4]"),
    ("train.py", "the epoch of a row is one step behind", '"epoch": done / per_epoch', '"epoch": step / per_epoch', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "evaluation runs in the micro-batches of training", "micro_batches(held_out, np.arange(len(held_out)), run, 2)", "micro_batches(held_out, np.arange(len(held_out)), run)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[eval_data=eval2]"),
    ("train.py", "--dtype=auto is bfloat16 everywhere", '(settings.dtype == "auto" and cuda)', 'settings.dtype == "auto"', "test_settings.py::test_bfloat16_is_the_default_on_cuda_only"),
    ("train.py", "--activation_checkpointing is ignored", "model.activation_checkpointing = s.activation_checkpointing", "model.activation_checkpointing = False", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[activation_checkpointing=true]"),
    ("train.py", "--compile compiles all but the last block", "for layer in model.layers if s.compile else ():", "for layer in model.layers[:-1] if s.compile else ():", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[compile=true]"),
    ("train.py", "a new model's window is the prompts' length", "max_position_embeddings=s.max_length, **ids", "max_position_embeddings=s.max_prompt_length, **ids", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[max_length=15]"),
    ("train.py", "with --epochs=0 the model is left in sft/", "sft_dir if s.epochs else run.out, run)", "sft_dir, run)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[epochs=0]"),
    ("train.py", "Weights & Biases is told the default mode", "mode=mode, config", 'mode="online", config', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[wandb=offline]"),
    ("train.py", "rewards/rejected is printed in place of the margin", '"/rewards/margins", "/rewards/chosen")', '"/rewards/rejected", "/rewards/chosen")', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "help shows the comment of another field after a colon in it", 'line.split(":")[0].strip(): line.split("  # ")[1]', 'line.split(":")[0].strip(): line.split(": ")[-1]', "test_settings.py::test_help_shows_every_setting_with_its_comment_and_default"),
    ("extra/kept.py", "the reference is checked against a tolerance without bf16", "0.5 if run.bf16 else 0.01", "0.01", "test_metrics.py::test_a_reference_that_is_not_the_policy_is_refused test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[dtype=bfloat16]"),
    ("train.py", "--tokenizer is used but not saved: the one in encoded/ is", "find(s.init_from or s.tokenizer or run.out", "find(s.init_from or run.out", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[tokenizer=tokenizer2]"),
    ("train.py", "a run's own settings come before the flags when resuming", "    known = base | given\n", "    known = given | base\n", "test_settings.py::test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often"),
    ("dpo.py", "the warmup may take all steps", "min(warmup, steps // 2)", "min(warmup, steps)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[warmup_steps=50]"),
    ("dpo.py", "the warmup begins at 0", "return (step + 1) / warmup", "return step / warmup", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("dpo.py", "the warmup lasts a step longer", "    if step < warmup:", "    if step <= warmup and warmup:", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=constant] test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("dpo.py", "Adam in place of AdamW: the decay is part of the gradient", "torch.optim.AdamW([matrices", "torch.optim.Adam([matrices", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[weight_decay=3.0]"),
    ("dpo.py", "other betas than torch's", "fused=True)", "fused=True, betas=(0.9, 0.95))", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("dpo.py", "RMSprop with the momentum of Adam", "torch.optim.RMSprop(trained)", "torch.optim.RMSprop(trained, momentum=0.9)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[optimizer=rmsprop]"),
    ("dpo.py", "--grad_clip=0 clips everything away", "clip or torch.inf)", "clip)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[grad_clip=0]"),
    ("dpo.py", "gradients of a step are kept for the next", "    optimizer.zero_grad()\n", "", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("dpo.py", "micro-batches are averaged as if all were as large", "(loss * scale).backward()", "(loss * scale / max(1, len(batch.ids))).backward()", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("dpo.py", "only the last micro-batch is logged", "        sums.update(metrics)\n", "        sums = Counter(metrics)\n", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("data.py", "the seed and the epoch are added: seed 1 begins with epoch 1 of seed 0", "default_rng((seed, epoch))", "default_rng(seed + epoch)", "test_settings.py::test_orders_of_seeds_and_epochs_are_all_different"),
    ("data.py", "without shuffling the order is reversed", "order if seed is None", "order[::-1] if seed is None", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[shuffle=false]"),
    ("extra/lora.py", "merged at half of what was trained", "module.weight.add_(b @ a, alpha=2)", "module.weight.add_(b @ a)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lora_rank=3]"),
    ("extra/lora.py", "B is not set back after merging", 'weights[f"layers.{name}.lora.1.weight"] = torch.zeros(b.shape)\n', 'weights[f"layers.{name}.lora.1.weight"] = b.detach().clone()\n', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lora_rank=3]"),
    ("extra/lora.py", "the base is trained along", "    model.requires_grad_(False)\n", "", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lora_rank=3]"),
    ("extra/refusals.py", "a choice is missing", '["constant", "linear", "cosine"]', '["constant", "linear"]', "test_settings.py::test_a_setting_of_words_takes_those_alone"),
    ("extra/refusals.py", "--log_every=0 is not refused", 'POSITIVE |= {"log_every"}\n', "", "test_settings.py::test_numbers_are_refused_where_they_mean_nothing"),
    ("extra/refusals.py", "infinite values pass", "and not 0 <= value < math.inf:", "and not 0 <= value:", "test_settings.py::test_numbers_are_refused_where_they_mean_nothing"),
    ("extra/refusals.py", "label smoothing of a half passes", 's.options.get("label_smoothing", 0) >= 0.5', 's.options.get("label_smoothing", 0) > 0.5', "test_settings.py::test_options_of_losses_are_refused_where_they_mean_nothing"),
    ("extra/refusals.py", "an odd head size passes", "s.hidden_size % (2 * s.num_heads)", "s.hidden_size % s.num_heads", "test_settings.py::test_settings_that_contradict_each_other_are_refused"),
    ("extra/refusals.py", "--batch_size may change when resuming", '"save_adapter", "wandb"}\n', '"save_adapter", "wandb", "batch_size"}\n', "test_settings.py::test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often"),
    ("extra/refusals.py", "an option of the loss may change when resuming", '    saved = saved | saved.get("options", {})\n', "", "test_settings.py::test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often"),
    ("extra/refusals.py", "a file may be named when resuming where there was none", 'elif name not in PATHS or "" in (value, before):', "elif name not in PATHS:", "test_settings.py::test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often"),
    ("extra/refusals.py", "to compile makes another run", '{"micro_batch_tokens", "activation_checkpointing", "compile"}', '{"micro_batch_tokens", "activation_checkpointing"}', "test_settings.py::test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often"),
    ("extra/refusals.py", "what changes when resuming is not said", '            if first:\n                print(f"--resume', '            if False:\n                print(f"--resume', "test_settings.py::test_a_resumed_run_keeps_its_settings_but_for_where_and_how_often"),
    ("extra/refusals.py", "DPO's learning rate is not said to be ignored without DPO", '{"loss", "beta", "sft_weight", "learning_rate", *s.options}', '{"loss", "beta", "sft_weight", *s.options}', "test_settings.py::test_flags_that_would_be_ignored_are_refused_and_no_others"),
    ("extra/refusals.py", "the window itself is refused", "s.max_length > window", "s.max_length >= window", "test_settings.py::test_settings_that_contradict_each_other_are_refused"),
    ("extra/refusals.py", "starting from its own sft/ is refused also where nothing is overwritten", "if s.sft_epochs and s.epochs else set()", "if s.sft_epochs else set()", "test_settings.py::test_settings_that_contradict_each_other_are_refused"),
    ("extra/files.py", "lines are read however long", "file.readline, LONGEST)", "file.readline)", "test_hostile_input.py::test_files_that_cannot_be_read"),
    ("extra/files.py", "an element may be as long as it likes", "if len(text) > LONGEST:", "if False:", "test_hostile_input.py::test_files_that_cannot_be_read"),
    ("extra/files.py", "an array is read whole", "file.read(PIECE), \"[\"", "file.read(), \"[\"", "test_hostile_input.py::test_a_file_is_read_in_pieces"),
    ("extra/files.py", "commas may be missing", "    if not text.startswith(\"]\"):\n", "    if not text:\n", "test_hostile_input.py::test_files_that_cannot_be_read"),
    ("extra/skipping.py", "one bad row more is skipped", "if self.skipped == self.most:", "if self.skipped > self.most:", "test_hostile_input.py::test_bad_rows_are_skipped_counted_and_shown"),
    ("extra/skipping.py", "all bad rows are shown", "if self.skipped <= 3 and", "if", "test_hostile_input.py::test_bad_rows_are_skipped_counted_and_shown"),
    ("extra/encoded.py", "skipped rows are not counted", "getattr(examples, \"skipped\", 0)", "0", "test_hostile_input.py::test_bad_rows_are_skipped_counted_and_shown"),
    ("extra/encoded.py", "conversations that the template refuses are not skipped", "attempt(laid_out, example, tokenizer) or ()", "laid_out(example, tokenizer)", "test_hostile_input.py::test_conversations_that_a_template_refuses_are_skipped"),
    ("train.py", "bad rows stop the training of a tokenizer and the sets", "data.read_examples(paths, kind, s.skip_bad_rows)", "data.read_examples(paths, kind)", "test_hostile_input.py::test_bad_rows_are_skipped_counted_and_shown"),
    ("extra/templates.py", "templates take the time they like", "if time.thread_time() - self.started > SECONDS:", "if False:", "test_hostile_input.py::test_templates_end_and_stay_in_their_sandbox[lipsum]"),
    ("extra/templates.py", "templates take the memory they like", "            BOUNDS.limit_memory()\n", "", "test_hostile_input.py::test_templates_end_and_stay_in_their_sandbox"),
    ("extra/templates.py", "the timer of somebody else is lost", "signal.setitimer(signal.ITIMER_REAL, *self.timer)", "signal.setitimer(signal.ITIMER_REAL, 0)", "test_hostile_input.py::test_the_bounds_are_gone_afterwards"),
    ("extra/templates.py", "half a surrogate pair is text", "        text.encode()\n", "        text.encode(errors=\"ignore\")\n", "test_hostile_input.py::test_templates_end_and_stay_in_their_sandbox"),
    ("extra/conversations.py", "rows may be nested as deeply as they like", "    for _ in range(DEPTH):\n", "    for _ in range(10**6):\n", "test_hostile_input.py::test_rows_that_cannot_be_used"),
    ("extra/refusals.py", "a directory that cannot be written is found at the end", "    check_writable(out, s.out_dir)\n", "", "test_hostile_input.py::test_what_the_run_could_not_write_is_found_at_once"),
    ("extra/refusals.py", "models beyond the memory are tried", "    if needed > there:\n", "    if False:\n", "test_hostile_input.py::test_new_models_out_of_their_range"),
    ("extra/encoded.py", "what is not finished is taken for what was there", "    shutil.rmtree(place, ignore_errors=True)\n", "", "test_data_path.py::test_what_was_not_finished_is_not_taken"),
    ("extra/encoded.py", "what was damaged is taken", 'return made == {"key": key, "files": files}', 'return made["key"] == key', "test_data_path.py::test_a_resumed_run_encodes_what_is_not_as_it_was_written"),
    ("extra/encoded.py", "what is encoded is of any files", 'said = [run.about["digests"], run', "said = [run", "test_data_path.py::test_a_resumed_run_encodes_what_was_made_of_something_else test_settings.py::test_a_run_that_begins_again_takes_what_it_has_encoded"),
    ("extra/encoded.py", "what is encoded has any lengths", "run.settings.rendered, limits]", "run.settings.rendered]", "test_data_path.py::test_a_resumed_run_encodes_what_was_made_of_something_else"),
    ("extra/encoded.py", "what is encoded was read in any way", 'said = [run.about["digests"], run.settings.rendered, limits]', 'said = [run.about["digests"], limits]', "test_data_path.py::test_a_resumed_run_encodes_what_was_made_of_something_else"),
    ("extra/encoded.py", "what is encoded is of any tokenizer", "said += [tokenizer.proto, *map", "said += [*map", "test_data_path.py::test_a_resumed_run_encodes_what_was_made_of_something_else"),
    ("extra/encoded.py", "what is encoded is by any chat template", "tokenizer.proto, *map(tokenizer.beside, BESIDE)]", "tokenizer.proto]", "test_data_path.py::test_a_resumed_run_encodes_what_was_made_of_something_else"),
    ("extra/encoded.py", "responses are encoded as if they began a text", "tokenizer.encode(responses, continuation=True)", "tokenizer.encode(responses)", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("extra/encoded.py", "only the first block is encoded", "    while block := list(itertools.islice(examples, 4096)):", "    for block in [list(itertools.islice(examples, 4096))]:", "test_settings.py::test_thousands_are_encoded_in_blocks_and_in_their_order"),
    ("extra/kept.py", "the precision is not part of the key", "{run.bf16} {run.device.type}", "{run.device.type}", "test_settings.py::test_a_reference_is_found_again_by_whatever_it_depends_on"),
    ("extra/kept.py", "which tokens are learnt is not part of the key", "(dataset.tokens, dataset.learnt, dataset.offsets, dataset.trees)", "(dataset.tokens, dataset.offsets, dataset.trees)", "test_settings.py::test_a_reference_is_found_again_by_whatever_it_depends_on"),
    ("extra/kept.py", "values that are infinite are taken", "known = np.isfinite(values)", "known = ~np.isnan(values)", "test_settings.py::test_a_reference_that_was_damaged_is_computed_anew"),
    ("extra/kept.py", "a file that was damaged is taken", "if hashlib.sha256(content[:-32]).digest() == content[-32:]:", "if True:", "test_settings.py::test_a_reference_that_was_damaged_is_computed_anew"),
    ("extra/kept.py", "what a pass has when it is interrupted is lost", "        if run.rank == 0 and path and new:\n", "        if False:\n", "test_settings.py::test_a_reference_pass_that_was_interrupted_is_gone_on_with"),
    ("extra/kept.py", "all is computed again after a pass that was interrupted", "if known[responses].all():", "if known.all():", "test_settings.py::test_a_reference_pass_that_was_interrupted_is_gone_on_with"),
    ("extra/kept.py", "responses are counted with their prompts", "slice(*(int(dataset.trees[e]) - e for", "slice(*(int(dataset.trees[e]) for", "test_settings.py::test_the_parts_of_a_reference_are_always_the_same"),
    ("extra/kept.py", "a disk that is full hides why a pass stopped", "with contextlib.suppress(OSError):\n", "with contextlib.nullcontext():\n", "test_settings.py::test_a_reference_is_written_whole_or_not_at_all"),
    ("extra/kept.py", "a pass is written after each part", "time.monotonic() - written > SECONDS", "time.monotonic() > written", "test_settings.py::test_a_reference_pass_that_lasts_is_written_each_minute"),
    ("extra/kept.py", "infinite log-probs are said to be other than the policy's", "if not (values.isfinite().all() and again.isfinite().all()):", "if (values + again.sum()).isnan().any():", "test_settings.py::test_log_probs_that_are_not_finite_are_refused_and_not_taken"),
    ("experiments/reviews.py", "the presets come after the flags and overrule them", 'if name not in given | unused}\n        train.main([*[f"--{name}={x}" for name, x in flags.items()], *arguments])', 'if name not in unused}\n        train.main([*arguments, *[f"--{name}={x}" for name, x in flags.items()]])', "test_settings.py::test_the_experiment_sets_what_the_command_line_does_not"),
    ("experiments/reviews.py", "the preset β overrules the loss's own", "if settings.beta != train.Settings.beta:", "if False:", "test_settings.py::test_the_experiment_sets_what_the_command_line_does_not"),
    ("experiments/reviews.py", "the preset learning rate is off by ten", '"learning_rate": 2e-4, "sft', '"learning_rate": 2e-5, "sft', "test_settings.py::test_the_experiment_sets_what_the_command_line_does_not"),
    ("experiments/reviews.py", "the run's seed does not reach the data", "write(out, settings.seed, DEMO", "write(out, 0, DEMO", "test_settings.py::test_the_experiment_sets_what_the_command_line_does_not"),
    ("experiments/reviews.py", "every rank writes the files", "            if first:\n                lock", "            if True:\n                lock", "test_settings.py::test_only_one_process_writes_and_reports"),
    ("experiments/reviews.py", "the files of a run that is at work are written again", "                lock = hold(out)", "                lock = out", "test_reports.py::test_the_experiment_leaves_another_run_alone"),
    ("experiments/reviews.py", "that there is no state is said twice", '*arguments, "--resume=false"]', "*arguments]", "test_reports.py::test_the_experiment_trains_on_its_files_and_reports"),
    ("experiments/reviews.py", "the report is against the run's start though there was SFT", 'report(out, out / "sft" if settings.sft_epochs else settings.init_from)', 'report(out, settings.init_from or out / "sft")', "test_settings.py::test_the_experiment_sets_what_the_command_line_does_not"),
    ("experiments/reviews.py", "held-out pairs are as many as the pairs", "min(1000, 2 * pairs)", "min(1000, pairs)", "test_settings.py::test_the_seed_of_the_run_is_that_of_its_data"),
    ("train.py", "a new model's vocabulary is what the data uses of it", "shape = max(vocab_size, tokenizer.vocab_size), s.hidden", "shape = vocab_size, s.hidden", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[tokenizer=tokenizer2]"),
    ("train.py", "BOS and EOS are exchanged in a new model's config.json", '{"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}', '{"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.bos_id}', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "the reference is kept beside --init_from though SFT has changed the model", "checkpoint = sft_dir if s.sft_epochs else s.init_from", "checkpoint = s.init_from or sft_dir", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[init_from=checkpoint]"),
    ("train.py", "SFT is evaluated on both responses of the pairs", 'both = sets["sft"], sets.get("sft eval")', 'both = sets["sft"], sets.get("eval pairs")', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[lr_schedule=linear]"),
    ("train.py", "a resumed stage is evaluated once more", "first, totals = run.load_state(stage, model, optimizer)", 'first, totals = run.load_state(stage, model, optimizer)\n    run.record(stage, {"step": first} | dpo.evaluate(model, micro_batches(held_out, np.arange(len(held_out)), run, 2), loss_of, run)) if held_out and first else None', "test_guard.py::test_a_run_that_is_stopped_loses_nothing[take_step-4-sft-4]"),
    ("train.py", "the run is named by its whole path", '"name": self.out.name', '"name": str(self.out)', "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[wandb=offline]"),
    ("train.py", "SFT begins anew when a run is resumed in DPO", "if s.sft_epochs and not sft_done:", "if s.sft_epochs:", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[resume=true]"),
    ("train.py", "a flag may be shortened", '"allow_abbrev": False', '"allow_abbrev": True', "test_train.py::test_what_is_no_setting_is_refused"),
    # What a run logs and prints, keeps and saves
    ("dpo.py", "the rewards of rejected responses are logged without beta", '"rewards/rejected": beta * pairs.b', '"rewards/rejected": pairs.b', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "a tie counts as accurate", '"rewards/accuracies": margins > 0', '"rewards/accuracies": margins >= 0', "test_metrics.py::test_both_data_sets_are_checked_and_bf16_begins_at_log_2"),
    ("dpo.py", "gradient_weight is that of pairs that are right already", '"gradient_weight": torch.sigmoid(-margins)', '"gradient_weight": torch.sigmoid(margins)', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "both_fell where either fell", "(pairs.a < 0) & (pairs.b < 0)", "(pairs.a < 0) | (pairs.b < 0)", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "logps/rejected is that of the reference", '"logps/rejected": pairs.rejected', '"logps/rejected": pairs.ref_rejected', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "the metrics are not weighted", "{name: add(double(value.detach())) for name, value in metrics.items()}", "{name: value.detach().double().sum() for name, value in metrics.items()}", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "soft labels are the wrong way round", "batch.labels * losses + (1 - batch.labels) * flipped", "(1 - batch.labels) * losses + batch.labels * flipped", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "the SFT term is a sum over tokens", "losses - sft_weight * pairs.chosen / pairs.chosen_length", "losses - sft_weight * pairs.chosen", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "the SFT term is of the rejected", "losses - sft_weight * pairs.chosen / pairs.chosen_length", "losses - sft_weight * pairs.rejected / pairs.rejected_length", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "SFT's loss is divided by all targets, hidden ones included", '"count": double(batch.learnt.sum())', '"count": torch.tensor(float(len(batch.learnt))).double()', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "the mean log-ratio is a mean reward", '(2 * beta * sums["count"] + 1e-12)', '(2 * sums["count"] + 1e-12)', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "grad_norm is logged after clipping", 'return sums | {"grad_norm": norm * sums["count"]}', 'norm = norm.clamp(max=clip or torch.inf)\n    return sums | {"grad_norm": norm * sums["count"]}', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "the evaluation is of the last batch alone", "        sums.update(loss_of(logps, batch)[1])", "        sums = loss_of(logps, batch)[1]", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("dpo.py", "the reference is computed outside of the autocast's precision", "values[batch.ids] += sequence_logps(model, batch).cpu()", 'with torch.autocast("cpu", enabled=False):\n            values[batch.ids] += sequence_logps(model, batch).cpu()', "test_metrics.py::test_the_reference_is_that_of_the_plain_model"),
    ("dpo.py", "training is not under autocast", "        with run.autocast:\n            logps = sequence_logps(model, batch)\n        loss, metrics", "        logps = sequence_logps(model, batch)\n        loss, metrics", "test_metrics.py::test_both_data_sets_are_checked_and_bf16_begins_at_log_2"),
    ("dpo.py", "evaluation is not under autocast", "        with run.autocast:\n            logps = sequence_logps(model, batch)\n        sums.update", "        logps = sequence_logps(model, batch)\n        sums.update", "test_metrics.py::test_both_data_sets_are_checked_and_bf16_begins_at_log_2"),
    ("train.py", "the epoch is logged as a whole number", '"epoch": done / per_epoch', '"epoch": epoch', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("train.py", "the learning rate that is logged is the peak", '"train/learning_rate": group["lr"]', '"train/learning_rate": peak', "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("train.py", "a resumed run draws the order of its epoch with the next", "examples = order[step % per_epoch * s.batch_size :]", "examples = order[(step - first) % per_epoch * s.batch_size :]", "test_metrics.py::test_a_resumed_run_goes_on_as_if_it_had_not_stopped"),
    ("train.py", "the mean log-ratio is never passed on", "            run.mean_logratio.copy_(dpo.mean_logratio(sums, s.beta))", "            run.mean_logratio = dpo.mean_logratio(sums, s.beta)", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("train.py", "the mean log-ratio is of all steps since the last row", "dpo.mean_logratio(sums, s.beta)", "dpo.mean_logratio(totals, s.beta)", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("train.py", "evaluation before the first step is left out", "(step in (0, steps) or (s.eval", "(step == steps or (step and s.eval", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("train.py", "evaluation one step late", "(s.eval_every and step % s.eval_every == 0)", "(s.eval_every and step % s.eval_every == 1)", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("extra/guard.py", "peak memory in MiB", "or most_resident()) / 2**30}", "or most_resident()) / 2**20}", "test_metrics.py::test_rates_count_training_alone"),
    ("train.py", "time runs from the beginning of the stage", "seconds, self.since = time.perf_counter() - self.since, time.perf_counter()", "seconds = time.perf_counter() - self.since", "test_metrics.py::test_rates_count_training_alone"),
    ("train.py", "tokens are learnt ones", "tokens=train.lengths[examples].sum()", "tokens=train.targets(examples)", "test_metrics.py::test_rates_count_training_alone"),
    ("train.py", "time left of all steps", "left = (steps - done) * s.batch_size", "left = steps * s.batch_size", "test_metrics.py::test_rates_count_training_alone"),
    ("train.py", "pairs per second are those of one rank", "(pairs=len(examples), tokens", "(pairs=len(examples) / run.world, tokens", "test_metrics.py::test_rates_are_those_of_all_ranks_together"),
    ("train.py", "frozen weights count as trained", "trained = sum(p.numel() for p in model.parameters() if p.requires_grad)", "trained = sum(p.numel() for p in model.parameters())", "test_metrics.py::test_what_is_printed_is_what_is_logged"),
    ("extra/kept.py", "the largest of both data sets is said of the smallest", "[again != 0].abs().max().item()", "[again != 0].abs().min().item()", "test_metrics.py::test_a_reference_that_is_not_the_policy_is_refused"),
    ("extra/kept.py", "the check at step 0 looks in one direction", "(again - values)[again != 0].abs().max().item()", "(again - values)[again != 0].max().item()", "test_metrics.py::test_a_reference_that_is_not_the_policy_is_refused"),
    ("extra/kept.py", "the check at step 0 takes the mean", "[again != 0].abs().max().item()", "[again != 0].abs().mean().item()", "test_metrics.py::test_a_reference_that_is_not_the_policy_is_refused"),
    ("extra/kept.py", "the check at step 0 lets NaN pass", "if not worst <= tolerance:", "if worst > tolerance:", "test_metrics.py::test_a_reference_that_is_not_the_policy_is_refused"),
    ("extra/kept.py", "the evaluation pairs have no check", "if not worst <= tolerance:", "if len(values) > 10 and not worst <= tolerance:", "test_metrics.py::test_both_data_sets_are_checked_and_bf16_begins_at_log_2"),
    ("train.py", "the values that training gets are those of the first batch again", "reference=values.float().numpy())", "reference=torch.where(again != 0, again, 0).float().numpy())", "test_metrics.py::test_the_reference_is_that_of_the_plain_model"),
    ("extra/states.py", "old states are left", "if old.name not in (place.name, before):", "if old.name == before:", "test_metrics.py::test_the_last_two_states_are_kept"),
    ("extra/states.py", "old states go before the new one is there", '    place = new.with_name(point["state"])\n    remove(place)  # it was passed over\n    new.rename(place)\n    sync(place.parent)\n    for old in place.parent.iterdir():\n        if old.name not in (place.name, before):\n            remove(old)\n', '    place = new.with_name(point["state"])\n    for old in place.parent.iterdir():\n        if old.name not in (new.name, before):\n            remove(old)\n    remove(place)  # it was passed over\n    new.rename(place)\n    sync(place.parent)\n', "test_metrics.py::test_a_run_killed_while_saving_has_its_state_before"),
    ("extra/states.py", "the moments are not restored", "    tensors = tensors_of(model, optimizer)\n    if saved.keys()", '    tensors = tensors_of(model, optimizer)\n    tensors = {n: x for n, x in tensors.items() if " " not in n}\n    saved = {n: saved[n] for n in tensors}\n    if saved.keys()', "test_metrics.py::test_a_resumed_run_goes_on_as_if_it_had_not_stopped"),
    ("extra/states.py", "rows after the state stay in the metrics", 'llm.write_whole(run.out / "metrics.jsonl", rows.read_bytes())', "pass", "test_metrics.py::test_a_resumed_run_goes_on_as_if_it_had_not_stopped"),
    ("train.py", "a resumed run writes run.json anew", '        if (mode := self.settings.wandb) != "disabled":', '        (self.out / "run.json").write_text(json.dumps({"settings": self.about["settings"]}))\n        if (mode := self.settings.wandb) != "disabled":', "test_metrics.py::test_run_json_holds_the_settings_as_they_are"),
    ("train.py", "a fresh run goes on with the old metrics", '            (self.out / "metrics.jsonl").write_text("")\n', '            (self.out / "metrics.jsonl").touch()\n', "test_train.py::test_a_fresh_start_removes_what_another_run_left"),
    ("train.py", "each rank prints", "        if self.rank == 0:\n            print(text, flush=True)", "        if self.rank >= 0:\n            print(text, flush=True)", "test_metrics.py::test_one_process_alone_reports"),
    ("train.py", "sums over ranks in float32", "values = dpo.double(torch.stack([x.to(self.device) for x in sums.values()]))", "values = torch.stack([x.to(self.device).float() for x in sums.values()])", "test_metrics.py::test_sums_are_added_up_in_float64"),
    ("extra/kept.py", "weights of the pairs are in the digest", "(dataset.tokens, dataset.learnt, dataset.offsets, dataset.trees)", "(dataset.tokens, dataset.learnt, dataset.offsets, dataset.trees, dataset.facts)", "test_metrics.py::test_a_reference_is_found_again"),
    ("extra/kept.py", "the name of the weights' file is left out", "{file.name} {file.stat", "{file.stat", "test_metrics.py::test_what_makes_another_reference"),
    ("extra/kept.py", "the path of a read-only checkpoint is the run's directory", 'else run.out / "encoded")', "else run.out)", "test_metrics.py::test_what_is_kept_and_cannot_be_used_is_computed_anew"),
    ("extra/kept.py", "what is found is said to be computed", "log-probs found in {path}", "log-probs computed", "test_metrics.py::test_a_reference_is_found_again test_metrics.py::test_a_resumed_run_goes_on_as_if_it_had_not_stopped"),
    ("extra/objectives.py", "a flipped pair has no mean", "other, length, -margin, mean)", "other, length, -margin)", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    ("extra/objectives.py", "BCO's mean has the wrong sign for rejected ones", "above, below = pairs.a - pairs.mean_logratio, pairs.mean_logratio - pairs.b", "above, below = pairs.a - pairs.mean_logratio, -pairs.mean_logratio - pairs.b", "test_metrics.py::test_every_row_is_that_of_the_plain_trainer"),
    # sample.py
    ("sample.py", "the nucleus does not reach its mass", "ordered[ordered.cumsum(-1) - ordered >= top_p] = 0", "ordered[ordered.cumsum(-1) >= top_p] = 0", "test_sample_flags.py::test_frequencies_are_those_of_a_plain_sampler"),
    ("sample.py", "a nucleus whose mass is reached takes another one", "- ordered >= top_p] = 0", "- ordered > top_p] = 0", "test_sample_flags.py::test_ties"),
    ("sample.py", "one random number for the whole batch", "torch.rand(len(sums), 1, device", "torch.rand(1, 1, device", "test_sample_flags.py::test_frequencies_are_those_of_a_plain_sampler"),
    ("sample.py", "the bound counts all heads", "c.num_hidden_layers * c.num_key_value_heads", "c.num_hidden_layers * c.num_attention_heads", "test_sample_flags.py::test_blocks_stay_within_four_gibibytes"),
    ("sample.py", "the bound forgets what is sampled", "max(map(len, encoded)) + max_new_tokens\n", "max(map(len, encoded))\n", "test_sample_flags.py::test_blocks_stay_within_four_gibibytes"),
    ("sample.py", "the template's stops only if all are conversations", "if any(map(data.is_turns, prompts)):", "if all(map(data.is_turns, prompts)):", "test_sample_flags.py::test_only_conversations_end_with_a_turn"),
    ("sample.py", "the columns are exchanged", "filter(None, (args.checkpoint, args.compare))", "filter(None, (args.compare, args.checkpoint))", "test_sample_flags.py::test_two_checkpoints_side_by_side"),
    ("sample.py", "the reference has the policy's tokenizer", "trees = draw(model, tokenizer, prompts, **options)\n        text", "tokenizer = data.find_tokenizer(args.checkpoint)\n        trees = draw(model, tokenizer, prompts, **options)\n        text", "test_sample_flags.py::test_two_checkpoints_side_by_side"),
    ("sample.py", "repeated prompts are not side by side", "return [prompt for prompt in prompts for _ in range(n)]", "return prompts * n", "test_sample_flags.py::test_a_flag_changes_what_it_says_and_nothing_else"),
    ("sample.py", "--n is ignored beside --prompts", "for _ in range(n)]", "for _ in range(1 if args.prompts else n)]", "test_sample_flags.py::test_completions_are_printed_under_their_prompts"),
    ("extra/reward.py", "--best_of draws one sample of each", "prompts = sample.read_prompts(args, n)", "prompts = sample.read_prompts(args, args.n)", "test_sample_flags.py::test_the_best_of_several"),
    ("sample.py", "a sequence that has ended goes on", "if not ids or ids[-1] not in stops:", "if True:", "test_sample_generate.py::test_stops_at_any_of_several_ids"),
    ("extra/commands.py", "--out alone prints", "or args.kl or args.out:", "or args.kl:", "test_sample_flags.py::test_candidates_are_the_samples_of_their_prompts"),
    ("sample.py", "--compile is not passed on", '"top_p", "seed", "compile")', '"top_p", "seed")', "test_sample_flags.py::test_a_flag_changes_what_it_says_and_nothing_else"),
    ("sample.py", "another default than the help says", '"--max_new_tokens", type=int, default=256', '"--max_new_tokens", type=int, default=128', "test_sample_flags.py::test_every_flag_has_a_case"),
    ("extra/reward.py", "--beta=0 counts as not given", "    if args.beta is not None:\n", "    if args.beta:\n", "test_sample_flags.py::test_beta_is_given_or_of_the_checkpoint_or_a_tenth"),
    ("extra/reward.py", "another tokenizer of as many pieces passes", "if not same or (tokenizer and other and tokenizer.proto != other.proto):", "if not same:", "test_sample_flags.py::test_a_reference_has_the_same_tokenizer"),
    ("extra/reward.py", "the template's space is in the candidates", "    return text.strip()\n", "    return text\n", "test_sample_flags.py::test_candidates_are_the_samples_of_their_prompts"),
    ("extra/reward.py", "the first reward is shown as the best's", "(reward {scores.max():.3f})", "(reward {scores[0]:.3f})", "test_sample_flags.py::test_the_best_of_several"),
    ("extra/reward.py", "rewards of other prompts", "np.concatenate(rewards).reshape(-1, n)", "np.concatenate(rewards).reshape(n, -1).T", "test_sample_flags.py::test_the_best_of_several"),
    ("extra/reward.py", "--best_of with the reference as policy", "trees, texts = draw_texts(policy, tokenizer", "trees, texts = draw_texts(reference, tokenizer", "test_sample_flags.py::test_the_best_of_several"),
    ("extra/reward.py", "the mean of the rows' means", "mean reward {np.concatenate(each).mean():.4f}", "mean reward {np.mean([r.mean() for r in each]):.4f}", "test_sample_flags.py::test_scores_of_rows_of_all_kinds"),
    ("extra/reward.py", "candidates are counted as rankings", "ranked = len(example.responses) > 1 and not drawn\n", "ranked = len(example.responses) > 1\n", "test_sample_flags.py::test_scores_of_rows_of_all_kinds"),
    ("dpo.py", "ties win", '"rewards/accuracies": margins > 0', '"rewards/accuracies": margins >= 0', "test_sample_flags.py::test_ties_are_no_wins"),
    ("extra/reward.py", "the correlation with the length of the chosen", "[len(chosen) - len(rejected) for _, chosen", "[len(chosen) for _, chosen", "test_sample_flags.py::test_margins_and_lengths_of_pairs"),
    ("extra/reward.py", "the window is of the prompt and the first response", "max(len(tree[0]) + max(map(len, tree[1:]))", "max(len(tree[0]) + len(tree[1])", "test_sample_flags.py::test_nothing_beyond_the_window_is_scored"),
    ("extra/reward.py", "the average under the reference", "(p.exp() * (p - q)).sum(-1)", "(q.exp() * (p - q)).sum(-1)", "test_sample_flags.py::test_divergence_is_a_plain_sum_over_the_samples"),
    ("extra/reward.py", "rows one too early", "torch.arange(len(batch.tokens) - len(batch.targets), len(batch.tokens))", "torch.arange(len(batch.tokens) - len(batch.targets), len(batch.tokens)) - 1", "test_sample_flags.py::test_divergences_belong_to_their_responses"),
    ("extra/reward.py", "divergences in the order of packing", "kl[examples] = sequence_kl(policy, reference, batch).cpu()", "kl[np.sort(examples)] = sequence_kl(policy, reference, batch).cpu()", "test_sample_flags.py::test_divergences_belong_to_their_responses"),
    ("extra/reward.py", "the error of KL with ddof 0", "kl.std(ddof=1) / len(kl) ** 0.5", "kl.std() / len(kl) ** 0.5", "test_sample_flags.py::test_divergence_is_a_plain_sum_over_the_samples"),
    ("extra/reward.py", "policy and reference exchanged", "kl = measure_kl(policy, reference, trees)", "kl = measure_kl(reference, policy, trees)", "test_sample_flags.py::test_divergence_is_a_plain_sum_over_the_samples"),
    ("extra/chat.py", "the answer is remembered with the template's space", '"content": said.strip()})', '"content": said})', "test_sample_flags.py::test_a_conversation_grows"),
    ("extra/chat.py", "the answer is remembered with what ends it", "said = tokenizer.decode([i for i in ids if i not in stops], continuation=True)", "said = tokenizer.decode(ids, continuation=True)", "test_sample_flags.py::test_a_conversation_grows"),
    ("extra/chat.py", "what ends the turn is shown", "self.ids += [i for i in new if i not in self.stops]", "self.ids += new", "test_sample_flags.py::test_a_conversation_grows"),
    ("extra/chat.py", "sampling flags do not reach the chat", "[turns], **options, on_token=stream)", '[turns], options["max_new_tokens"], on_token=stream)', "test_sample_flags.py::test_a_conversation_grows"),
    ("extra/chat.py", "nothing but EOS ends an answer", "return {tokenizer.eos_id, end_of_turn(tokenizer), *tokenizer.stops}", "return {tokenizer.eos_id, *tokenizer.stops}", "test_sample_flags.py::test_what_ends_an_answer"),
    ("extra/cache.py", "compiled steps are of many shapes", "used = self.size if self.compile else self.used", "used = self.used", "test_sample_flags.py::test_each_step_is_compiled_in_one_shape"),
    ("extra/cache.py", "the cache is float32 under autocast", "dtype = torch.get_autocast_dtype(kind)", "dtype = torch.float32", "test_sample_flags.py::test_the_cache_has_the_precision_in_use"),
    ("model.py", "embeddings begin as small as the matrices", '0.125 if "embed" in name else 1', "1", "test_model.py::test_initial_weights"),
    ("model.py", "init does not go by the width", "(2 * width * share) ** -0.5", "(256 * share) ** -0.5", "test_model.py::test_initial_weights"),
    ("extra/cache.py", "nobody ever leaves", "            if not self.compile:\n                self.leave()", "            pass", "test_sample_generate.py::test_sequences_that_have_ended_leave"),
    ("extra/cache.py", "who has ended is asked of the last token only", "self.ended |= torch", "self.ended = torch", "test_sample_generate.py::test_sequences_that_have_ended_leave"),
    ("extra/cache.py", "those that stay are given others' keys", "self.stored[:, :, going, : self.used]", "self.stored[:, :, : going.sum(), : self.used]", "test_sample_generate.py::test_sequences_that_have_ended_leave"),
    ("extra/cache.py", "those that stay are given others' positions", "self.running[going], self.lengths[going]", "self.running[going], self.lengths[: going.sum()]", "test_sample_generate.py::test_sequences_that_have_ended_leave"),
    ("extra/cache.py", "logits go to others' rows", "whole.index_copy(0, self.running, logits)", "whole.index_copy(0, self.sequences, logits)", "test_sample_generate.py::test_sequences_that_have_ended_leave"),
    ("extra/cache.py", "they leave when three quarters have ended", "4 * going.sum() > 3 * len(going)", "4 * going.sum() > len(going)", "test_sample_generate.py::test_sequences_that_have_ended_leave"),
    ("extra/refusals.py", "--score --seed is ignored", 'sampler = shaped | {"max_new_tokens", "seed", "compile"}', 'sampler = shaped | {"max_new_tokens", "compile"}', "test_sample_flags.py::test_flags_are_refused_where_they_would_be_ignored"),
    ("extra/refusals.py", "--beta without a reward is ignored", '({"beta"}, not (args.score or args.best_of)', '({"beta"}, not args.compare', "test_sample_flags.py::test_flags_are_refused_where_they_would_be_ignored"),
    ("extra/refusals.py", "--temperature=0 --n draws copies", '({"top_k", "top_p", "seed", "n", "best_of"}, greedy', '({"top_k", "top_p", "seed"}, greedy', "test_sample_flags.py::test_flags_are_refused_where_they_would_be_ignored"),
    ("extra/refusals.py", "--best_of --out is refused", "written = args.out and not (args.score or args.best_of", "written = args.out and not (args.score", "test_sample_flags.py::test_flags_are_refused_where_they_would_be_ignored"),
    ("sample.py", "completions lose their first space", "text = partial(tokenizer.decode, continuation=True)", "text = partial(tokenizer.decode)", "test_sample_flags.py::test_two_checkpoints_side_by_side"),
    ("sample.py", "blocks of up to 999", "size, new = min(1000,", "size, new = min(999,", "test_sample_flags.py::test_no_block_is_that_of_another_seed"),
    ("sample.py", "top-k of the whole batch", "logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]", "logits.topk(min(top_k, logits.shape[-1])).values[:1, -1:]", "test_sample_flags.py::test_frequencies_are_those_of_a_plain_sampler"),
    ("extra/reward.py", "what --best_of writes is shown, too", "        if not args.out:\n", "        if True:\n", "test_sample_flags.py::test_the_best_of_several"),
    ("extra/reward.py", "the number of prompts as that of samples", "nats per response, {len(kl):,} samples", "nats per response, {len(kl) // args.n:,} samples", "test_sample_flags.py::test_divergence_is_a_plain_sum_over_the_samples"),
    ("extra/reward.py", "β is not passed on to --best_of", "rewards = implicit_rewards(policy, reference, trees, beta_of(args))\n    rows = candidates", "rewards = implicit_rewards(policy, reference, trees, 0.1)\n    rows = candidates", "test_sample_flags.py::test_the_best_of_several"),
    ("extra/reward.py", "the error of the accuracy without the weights", 'right - averages["eval/rewards/accuracies"] * weights', 'right - averages["eval/rewards/accuracies"]', "test_sample_flags.py::test_scores_of_rows_of_all_kinds"),
    ("extra/reward.py", "margins of other rows in the correlation", "[trees[e] for e in ranked], [rewards[e] for e in ranked]", "[trees[e] for e in ranked], rewards[: len(ranked)]", "test_sample_flags.py::test_margins_and_lengths_of_pairs"),
    ("extra/reward.py", "rewards are written worst first", 'row["rewards"] = scores.tolist()', 'row["rewards"] = sorted(scores.tolist(), reverse=True)', "test_sample_flags.py::test_scores_of_rows_of_all_kinds"),
    ("extra/chat.py", "the user's turn is not remembered with the answer", '        turns.append({"role": "user", "content": text})\n', '        turns = turns[:1] + [{"role": "user", "content": text}]\n', "test_sample_flags.py::test_a_conversation_grows"),
    ("extra/chat.py", "--chat samples with the defaults' stops", "stream = Stream(tokenizer, stops)", "stream = Stream(tokenizer, {tokenizer.eos_id})", "test_sample_flags.py::test_a_conversation_grows"),
    # From a file to a batch, and the doctor
    ("data.py", "a continuation loses its leading and double spaces with models that remove them", '\\x1a\\x04\\x18\\x00\\x20\\x00"', '\\x1a\\x02\\x18\\x00"', "test_data_path.py::test_a_continuation_is_encoded_as_it_stands"),
    ("data.py", "the room of a response is what the uncut prompt leaves", "room = max(max_length - min(len(prompt), max_prompt), 0)", "room = max(max_length - len(prompt), 0)", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "an example is cut to nothing that is learnt, and kept", "any(max(ids, default=-1) < 0 for ids in cut)", "not all(cut)", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "the last reason that applies is counted, not the first", "max(spoilt, key=spoilt.get)", "[what for what in spoilt if spoilt[what]][-1]", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "a ranking with two equal responses is dropped", "len(distinct) < min(2, len(responses))", "len(distinct) < len(responses)", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "the weights are those of the examples before the drops", "            if tree := fit(token_ids(example, tokenizer), max_length, max_prompt, counts):\n                facts.append((example.weight, example.label, example.margin))\n", "            facts.append((example.weight, example.label, example.margin))\n            if tree := fit(token_ids(example, tokenizer), max_length, max_prompt, counts):\n", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "token id 0 counts as hidden", "learnt = flat >= 0", "learnt = flat > 0", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "a ranking's weight is divided by its responses, not its pairs", "[max(1, len(several)), 1, 1]", "[len(responses), 1, 1]", "test_data_path.py::test_rankings_share_the_weight_of_one_example"),
    ("data.py", "a stand-in is learnt", "learnt.append(real * dataset.learnt[response])", "learnt.append(dataset.learnt[response])", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "the lengths count what is hidden", "lengths=integers([max(1, mask.sum()) for mask in learnt])", "lengths=integers([max(1, len(mask)) for mask in learnt])", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "the reference is taken in the order of the batch", "else dataset.reference[ids]", "else dataset.reference[: len(ids)]", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "a batch is soft if all labels are", "soft=bool((facts[:, 1] < 1).any())", "soft=bool((facts[:, 1] < 1).all())", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "the targets of SFT's loss count the users' turns", "sum(int(self.learnt[where].sum()) for e in examples", "sum(where.stop - where.start for e in examples", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "a packed micro-batch may not be full", "all(load <= budget or", "all(load < budget or", "test_data_path.py::test_a_full_micro_batch_is_within_its_budget"),
    ("data.py", "the retry doubles the micro-batches", "count += 1 + count // 16", "count *= 2", "test_data_path.py::test_packing_takes_as_few_micro_batches_as_the_rule_allows"),
    ("data.py", "seed 0 does not shuffle", "order if seed is None else", "order if not seed else", "test_data_path.py::test_every_seed_and_epoch_has_its_own_order"),
    ("extra/files.py", "blank lines do not count as lines", "enumerate(lines, 1):", "enumerate(filter(bytes.strip, lines), 1):", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "only the first of several files is read", 'for p in paths.split(",") if p', 'for p in paths.split(",")[:1] if p', "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "for SFT chosen is taken though the row has a response", 'if row.keys() - {"id", *names} or not', 'if row.keys() - {"id", "response", *names} or not', "test_data_path.py::test_every_row_reaches_its_batch"),
    ("data.py", "a tokenizer is trained on best responses alone", "for content in (e.prompt, *e.responses))", "for content in (e.prompt, *e.responses[:1]))", "test_data_path.py::test_a_trained_tokenizer_has_seen_every_text"),
    ("data.py", "a tokenizer is trained on a conversation's first turn", "for t in (c if is_turns(c)", "for t in (c[:1] if is_turns(c)", "test_data_path.py::test_a_trained_tokenizer_has_seen_every_text"),
    ("extra/conversations.py", "a weight of 0 counts as missing", "    if value is None:\n        return default", "    if not value:\n        return default", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/formats.py", "the margin of scores has the wrong sign", "margin = scores[0] - scores[1]", "margin = scores[1] - scores[0]", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/public.py", "a summary keeps its own space beside the added one", 'f" {t.lstrip()}"', 'f" {t}"', "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/conversations.py", "a quoted Human: without its colon opens a turn", 'r"(?:\\A|\\n\\n)(Human|Assistant): ?"', 'r"(?:\\A|\\n\\n)(Human|Assistant):? ?"', "test_data_path.py::test_quoted_turns_open_none"),
    ("extra/conversations.py", "a quoted Human: after one newline opens a turn", 'r"(?:\\A|\\n\\n)(Human|Assistant): ?"', 'r"(?:\\A|\\n+)(Human|Assistant): ?"', "test_data_path.py::test_quoted_turns_open_none"),
    ("extra/conversations.py", "what both responses begin with is moved to the prompt, even the last turn", "limit = min(len(chosen), len(rejected)) - 1", "limit = min(len(chosen), len(rejected))", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/conversations.py", "the shortest repetition is found, not the longest", "    for start in range(len(history) + 1):\n", "    for start in reversed(range(len(history) + 1)):\n", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/public.py", "SFT learns only a conversation's first answer", "return turns[: answers[0]], (turns[answers[0] : said[-1] + 1],)", "return turns[: answers[0]], (turns[answers[0] : answers[0] + 1],)", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/public.py", "for SFT a row with messages and a pair is read as a pair", '"demonstrations": DEMONSTRATIONS + PREFERENCES + KTO + SINGLE', '"demonstrations": PREFERENCES + DEMONSTRATIONS + KTO + SINGLE', "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/chat.py", "users' turns within a response are learnt", "self.split(opened[len(done) :], True)", "self.split(opened[len(done) :])", "test_data_path.py::test_what_is_learnt_of_a_conversation"),
    ("extra/chat.py", "an answer that the template leaves open has no end", "return parts if ended else [*parts, Part([self.tokenizer.eos_id], hidden)]", "return parts", "test_chat.py::test_every_answer_ends"),
    ("extra/chat.py", "the guard stays in the text", 'Part(piece.replace(GUARD, ""), hidden)', "Part(piece, hidden)", "test_data_path.py::test_what_is_learnt_of_a_conversation"),
    ("extra/chat.py", "a prompt begins as if it went on", '"after" if before else "first"', '"after" if before else "inside"', "test_chat.py::test_every_answer_ends"),
    ("extra/formats.py", "an answer is empty if its first turn is", "if said_nothing(turns):", "if said_nothing(turns[:1]):", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/chat.py", "the assistant's turn is opened if any response begins with it", 'answer = all(r[0]["role"]', 'answer = any(r[0]["role"]', "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/tokenizers.py", "shorter control tokens are found within longer ones", "sorted(tokens, key=len, reverse=True)", "sorted(tokens, key=len)", "test_data_path.py::test_names_of_control_tokens_are_those_of_the_files_beside_the_model"),
    ("extra/tokenizers.py", "EOS is the model's though tokenizer_config.json names another", "            if self.names.get(name) not in self.control:\n", "            if True:\n", "test_data_path.py::test_names_of_control_tokens_are_those_of_the_files_beside_the_model"),
    ("extra/encoded.py", "what another run left is found again", "if run.settings.resume and is_whole", "if is_whole", "test_data_path.py::test_what_is_encoded_is_kept_for_other_ranks_and_resumed_runs"),
    ("extra/encoded.py", "all sets are kept in one place", 'name.replace(" ", "_")', "name.split()[0]", "test_data_path.py::test_what_is_encoded_is_kept_for_other_ranks_and_resumed_runs"),
    ("extra/encoded.py", "every rank encodes", "    run.alone(encode_in, place,", "    encode_in(place,", "test_data_path.py::test_other_ranks_wait_for_the_first"),
    ("extra/encoded.py", "texts without a prompt are continuations", "return isinstance(example.prompt, str) and bool(example.prompt) and not", "return isinstance(example.prompt, str) and not", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/doctor.py", "evaluation files' examples count in the total", "unusable += diagnose(path, held_out, set(), tokenizer, limits, 0)[UNUSABLE]", "total += diagnose(path, held_out, set(), tokenizer, limits, 0)", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "unusable rows of evaluation files leave the exit code 0", "unusable += diagnose(path, held_out, set(), tokenizer, limits, 0)[UNUSABLE]", "diagnose(path, held_out, set(), tokenizer, limits, 0)", "test_doctor.py::test_large_numbers_have_commas_and_bad_rows_leave_the_rest"),
    ("extra/terminal.py", "the 95 % column is the 90 % quantile", "[0.05, 0.5, 0.95, 1]", "[0.05, 0.5, 0.9, 1]", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "rejected is the second of a ranking, not its worst", "responses[0], responses[-1], prompt", "responses[0], responses[:2][-1], prompt", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "the tokens in all are scaled by the examples that are left", "total / len(sample)", "total / len(dataset)", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "the sample favours late examples", 'rng.randrange(facts["examples"])', "rng.randrange(SAMPLE)", "test_doctor.py::test_every_example_is_as_likely_to_be_in_the_sample"),
    ("extra/doctor.py", "contradictions are looked for where only the prompt is the same", "reverse in seen and this != reverse", "prompt in seen and this not in seen", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "texts without a prompt share a prompt", "prompted and prompt in seen", "prompt in seen", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "--show acts on the first file only", "limits, args.show, out)", "limits, args.show if not seen else 0, out)", "test_doctor.py::test_what_is_shown_is_what_the_model_reads"),
    ("extra/doctor.py", "a file of pairs with one text in it is shown as SFT", "alone = all(len(example.responses) == 1", "alone = any(len(example.responses) == 1", "test_doctor.py::test_every_number_of_a_random_mixture"),
    ("extra/doctor.py", "the progress is said every 10,000 rows", "if number % 100_000 == 0:", "if number % 10_000 == 0:", "test_doctor.py::test_a_large_file_says_how_far_it_is_read"),
    ("extra/doctor.py", "a later file without a usable row ends quietly", '        raise data.DataError(f"{path}: no row can be used")\n', "        return facts\n", "test_doctor.py::test_a_file_of_which_nothing_can_be_used_ends_it"),
    ("extra/doctor.py", "repeated encodings of an example count as more of the file", "total / len(sample)", 'total / counts["examples"]', "test_doctor.py::test_what_the_template_writes_again_is_encoded_as_often"),
    ("extra/doctor.py", "prompts that end in a newline count as ending in a space", 'example.prompt[-1] in " \\t"', "example.prompt[-1].isspace()", "test_doctor.py::test_shapes_of_text_are_counted"),
    ("extra/doctor.py", "a ranking counts as repeating its prompt if one response does", "len(repeats) > 1 and all(repeats)", "len(repeats) > 1 and any(repeats)", "test_doctor.py::test_shapes_of_text_are_counted"),
    ("extra/doctor.py", "control tokens are looked for in the prompt alone", "itertools.chain(*map(texts, contents))", "texts(example.prompt)", "test_doctor.py::test_spelt_control_tokens_are_counted_and_shown_as_what_they_are"),
    ("extra/doctor.py", "turns that spell control tokens are told of --rendered", "facts[spelt_in_turns if data.is_turns(example.prompt) else spelt]", "facts[spelt]", "test_doctor.py::test_spelt_control_tokens_are_counted_and_shown_as_what_they_are"),
    ("extra/doctor.py", "pairs of which both are cut count as one-sided", "any(cut) and not all(cut)", "any(cut)", "test_doctor.py::test_responses_of_which_only_some_keep_their_end"),
    ("extra/doctor.py", "a ranking's responses are compared out of step once equal ones are left out", "distinct = dict.fromkeys(map(tuple, example.responses))\n", "distinct = example.responses\n", "test_doctor.py::test_responses_of_which_only_some_keep_their_end"),
    ("extra/doctor.py", "a cut before the newline behind a turn's end tears a turn", "or tokenizer.decode(gone[-1:], True).isspace()", "or False", "test_doctor.py::test_a_cut_is_inside_a_turn_unless_one_ends_there"),
    ("extra/doctor.py", "every cut prompt is torn, of texts, too", "if conversation and lost:", "if lost:", "test_doctor.py::test_a_cut_is_inside_a_turn_unless_one_ends_there"),
    ("extra/chat.py", "a joint encoding is compared by its length", "return joint != left + right", "return len(joint) > len(left + right)", "test_doctor.py::test_boundaries_that_a_joint_encoding_merges"),
    ("extra/doctor.py", "the bars are of the best response, not the longest", "prompt + max(responses)))", "prompt + responses[0]))", "test_doctor.py::test_without_a_tokenizer_the_bars_are_of_characters"),
    ("extra/doctor.py", "the rows of evaluation files are written, too", "diagnose(path, held_out, set(), tokenizer, limits, 0)[UNUSABLE]", "diagnose(path, held_out, set(), tokenizer, limits, 0, out)[UNUSABLE]", "test_doctor.py::test_out_writes_the_rows_that_can_be_used"),
    ("extra/doctor.py", "duplicates are left out of --out", "        if out:\n", "        if out and hash(str(example.prompt)) not in seen:\n", "test_doctor.py::test_out_writes_the_rows_that_can_be_used"),
    ("extra/doctor.py", "what the file was called is compared, not what it is", "{path.resolve(), new.resolve()}", "{path, new}", "test_doctor.py::test_out_is_a_file_of_its_own"),
    ("extra/doctor.py", "a doctor that stops leaves half a file", "        with contextlib.suppress(OSError):\n            new.unlink()\n", "        pass\n", "test_doctor.py::test_out_leaves_no_half_file"),
    ("extra/terminal.py", "rows of equal width: a heavy tail leaves one bar", "np.geomspace(", "np.linspace(", "test_doctor.py::test_bars_of_a_heavy_tail"),
    ("extra/terminal.py", "a row holds lengths on both sides of the limit", "        edges.add(limit + 1)\n", "        pass\n", "test_doctor.py::test_every_length_is_in_one_bar"),
    ("extra/terminal.py", "lengths at the limit count as beyond it", "(lengths > limit).mean()", "(lengths >= limit).mean()", "test_doctor.py::test_every_length_is_in_one_bar"),
    ("extra/terminal.py", "a text's own brackets look like a control token's", 'PLAIN |= str.maketrans("⟦⟧", "[]")\n', "", "test_doctor.py::test_spelt_control_tokens_are_counted_and_shown_as_what_they_are"),
    # The built-in experiment, the benchmark, the model
    ("experiments/reviews.py", "SFT and DPO are swapped", '(("SFT", reference), ("DPO", policy))', '(("SFT", policy), ("DPO", reference))', "test_reports.py::test_every_figure_of_the_report_is_a_plain_sum"),
    ("experiments/reviews.py", "policy and reference are swapped when they are loaded", "policy, tokenizer = load(checkpoint)\n    reference, _ = load(other)", "policy, tokenizer = load(other)\n    reference, _ = load(checkpoint)", "test_reports.py::test_every_figure_of_the_report_is_a_plain_sum"),
    ("experiments/reviews.py", "a sample that was cut off is accepted", "return np.where(ended, [grammar.score(x, y)[1] for x, y in zip(prompts, texts)], np.nan)", "return np.array([grammar.score(x, y)[1] for x, y in zip(prompts, texts)])", "test_reports.py::test_every_figure_of_the_report_is_a_plain_sum"),
    ("experiments/reviews.py", "ended is asked of BOS", "response[-1] == tokenizer.eos_id", "response[-1] != tokenizer.bos_id", "test_reports.py::test_every_figure_of_the_report_is_a_plain_sum"),
    ("experiments/reviews.py", "more held-out labels than it says", "held_out = min(count, 2000)", "held_out = min(count, 5000)", "test_reports.py::test_at_most_two_thousand_held_out_labels"),
    ("experiments/reviews.py", "entropy and loss are swapped in print", '{m["loss"]:.4f} nats; entropy of the grammar {m["entropy"]:.4f}', '{m["entropy"]:.4f} nats; entropy of the grammar {m["loss"]:.4f}', "test_reports.py::test_the_report_prints_these_figures_and_samples"),
    ("experiments/reviews.py", "weights of tastes are not normalised", "p.append(p1 / len(aspects) * p2 * p3 * p4 / total)", "p.append(p1 / len(aspects) * p2 * p3 * p4)", "test_reports.py::test_the_grammar_samples_by_its_tables"),
    ("experiments/reviews.py", "the evaluation prompts are among those of training", '"train": prompts[order[200:]]}', '"train": prompts[order[100:]]}', "test_reports.py::test_the_files_of_the_experiment_say_what_they_are_for"),
    ("experiments/reviews.py", "an n-th clause's entropy counts always", "reach = COUNTS[::-1].cumsum()[::-1]", "reach = np.ones(3)", "test_reports.py::test_optimum_and_frontier_are_tilted_sums_over_rewards"),
    ("experiments/reviews.py", "evaluation data do not depend on the split", 'rng = np.random.default_rng([self.seed, 1, split == "eval"])', "rng = np.random.default_rng([self.seed, 1])", "test_reports.py::test_the_files_of_the_experiment_say_what_they_are_for"),
    ("experiments/reviews.py", "label prefers the worse", "better - worse + rng.logistic() < 0", "better - worse + rng.logistic() > 0", "test_reports.py::test_label_pairs_neighbours"),
    ("experiments/reviews.py", "--count is ignored", "report(args.checkpoint, args.reference, args.count)", "report(args.checkpoint, args.reference)", "test_reports.py::test_each_flag_of_the_reviews_script_acts"),
    ("experiments/reviews.py", "the report compares the SFT model with itself", 'report(out, out / "sft" if settings.sft_epochs else settings.init_from)', 'report(out / "sft", out / "sft" if settings.sft_epochs else settings.init_from)', "test_reports.py::test_the_experiment_trains_on_its_files_and_reports"),
    ("experiments/losses.py", "the reference of a row is the last policy", "m = measure(out, start, args.count)", "m = measure(start, out, args.count)", "test_reports.py::test_the_table_of_losses"),
    ("experiments/losses.py", "--count is ignored", "m = measure(out, start, args.count)", "m = measure(out, start, 5000)", "test_reports.py::test_the_table_of_losses"),
    ("experiments/rlhf.py", "the reward is read one word too early", ".sum(1) - 1  # start", ".sum(1) - 2  # start", "test_rlhf.py::test_the_reward_model_is_a_sequence_classifier_of_transformers"),
    ("experiments/rlhf.py", "the reward model prefers the rejected response", "rewards[batch.chosen] - rewards[batch.rejected]", "rewards[batch.rejected] - rewards[batch.chosen]", "test_rlhf.py::test_the_reward_model_learns_its_pairs"),
    ("experiments/rlhf.py", "the baseline of RLOO has the sample itself in it", "others = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)", "others = returns.mean(1, keepdim=True)", "test_rlhf.py::test_the_gradient_of_rloo_is_exact_on_average"),
    ("experiments/rlhf.py", "the KL of a sample has a gradient of its own", "(logps.detach() - ref_logps)", "(logps - ref_logps)", "test_rlhf.py::test_the_gradient_of_rloo_is_exact_on_average"),
    ("experiments/rlhf.py", "the reference of RLOO is the policy as it is", "ref_logps = dpo.sequence_logps(reference, batch)", "ref_logps = dpo.sequence_logps(policy, batch)", "test_rlhf.py::test_the_steps_of_rloo"),
    ("experiments/rlhf.py", "the baseline is of other prompts' samples", "(x.view(prompts, k) for x in", "(x.view(k, prompts).T for x in", "test_rlhf.py::test_the_steps_of_rloo"),
    ("experiments/frontier.py", "flips of another seed", "exact.flip_labels(examples, entry.flips, entry.seed)", "exact.flip_labels(examples, entry.flips, 1 + entry.seed)", "test_frontier.py::test_pairs_of_a_seed_are_paired"),
    ("experiments/frontier.py", "right labels are wrong", "if round(better, 6) < round(worse, 6):", "if round(better, 6) > round(worse, 6):", "test_frontier.py::test_pairs_of_a_seed_are_paired"),
    ("experiments/frontier.py", "KL is that of the reference's samples", "trees = sample.draw(policy, tokenizer, prompts, max_new_tokens=64, seed=seed)", "trees = sample.draw(reference, tokenizer, prompts, max_new_tokens=64, seed=seed)", "test_frontier.py::test_what_is_measured"),
    ("experiments/frontier.py", "a later round begins at the first model", "        start = where\n", "        start = start\n", "test_frontier.py::test_a_sweep_is_made_once_and_goes_on"),
    ("experiments/frontier.py", "what was another entry's run counts", "if not (ended(out) and is_of(out, identity(entry, root, samples))):", "if not ended(out):", "test_frontier.py::test_a_sweep_is_made_once_and_goes_on"),
    ("experiments/frontier.py", "a run that diverged ends the sweep", 'if "diverged" not in str(error) and', 'if "diverged" in str(error) and', "test_frontier.py::test_a_sweep_is_made_once_and_goes_on"),
    ("experiments/frontier.py", "the seconds begin anew", "about[\"seconds\"] = before + time.monotonic() - began", "about[\"seconds\"] = time.monotonic() - began", "test_frontier.py::test_a_sweep_is_made_once_and_goes_on"),
    ("experiments/rlhf.py", "RLOO samples from the reference", "drawn = sample.draw(policy, tokenizer,", "drawn = sample.draw(reference, tokenizer,", "test_rlhf.py::test_the_steps_of_rloo"),
    ("experiments/rlhf.py", "a response without an end has a reward", "return np.where(ended, found, WORST)", "return found", "test_rlhf.py::test_the_reward_model_learns_its_pairs"),
    ("experiments/replaced.py", "the row of DPO has samples of the reference", 'trees = sample.draw(policy, tokenizer, prompts, 64)\n    kl = measure_kl(policy, reference, trees)\n    add("DPO"', 'trees = sample.draw(reference, tokenizer, prompts, 64)\n    kl = measure_kl(policy, reference, trees)\n    add("DPO"', "test_rlhf.py::test_the_table"),
    ("tests/benchmark.py", "ratios upside down", "ratios = [a / b for a, b in zip(seconds[slow], seconds[fast])]", "ratios = [b / a for a, b in zip(seconds[slow], seconds[fast])]", "test_reports.py::test_measurements_in_turn"),
    ("tests/benchmark.py", "a step of ours is the ladder's last", 'statistics.median(seconds["shared prompt"]), work(', 'statistics.median(seconds["ours, live"]), work(', "test_reports.py::test_the_table_of_steps"),
    ("tests/benchmark.py", "pairs of a block only", "pairs, tokens = len(trees) / median, asks[0] / median", "pairs, tokens = len(blocks) / median, asks[0] / median", "test_reports.py::test_the_table_of_steps"),
    ("tests/benchmark.py", "tokens are targets", "asks[0] / median", "asks[1] / median", "test_reports.py::test_the_table_of_steps"),
    ("tests/benchmark.py", "a cached reference is run", '"cached reference": make_step(standard, model, None, bf16)', '"cached reference": make_step(standard, model, reference, bf16)', "test_reports.py::test_each_row_of_the_ladder_runs_what_it_is_named_for"),
    ("tests/benchmark.py", "lengths of the mixture are unbounded", "8, 1024))", "8, 10**9))", "test_reports.py::test_the_mixture_has_the_lengths_it_says"),
    ("tests/benchmark.py", "memory's ratio is upside down", "ratio {c / a:.3f} and {d / b:.3f}", "ratio {a / c:.3f} and {b / d:.3f}", "test_reports.py::test_the_table_of_memory"),
    ("tests/benchmark.py", "freed tensors count", "self.live -= size\n", "self.live -= 0\n", "test_reports.py::test_peak_memory_is_that_of_live_tensors"),
    ("extra/guard.py", "peak memory is that of the process before, too", "    if STATUS.exists():\n        for line", "    if False:\n        for line", "test_metrics.py::test_rates_count_training_alone"),
    ("extra/guard.py", "address space for RAM", 'line.startswith("VmHWM:")', 'line.startswith("VmPeak:")', "test_metrics.py::test_rates_count_training_alone"),
    ("tests/benchmark.py", "growth of the wrong size", "s = base | {size: int(value * factor)}", "s = base | {'prompt': int(value * factor)}", "test_reports.py::test_the_table_of_growth"),
    ("tests/benchmark.py", "tokens of one sequence", 'speed = batch * 64 / statistics.median(seconds["ours"])', 'speed = 64 / statistics.median(seconds["ours"])', "test_reports.py::test_the_table_of_sampling"),
    ("tests/benchmark.py", "a plan's longest is the sum", "len(loads) * max(loads)", "max(loads)", "test_reports.py::test_the_figures_of_planning_and_start"),
    ("tests/benchmark.py", "ranks compare as many pairs", "pairs = 48 if before else 24", "pairs = 48 if not before else 24", "test_reports.py::test_the_table_of_ranks"),
    ("tests/benchmark.py", "seconds for milliseconds", "{seconds[1] * 1000:.1f} ms", "{seconds[1]:.1f} ms", "test_reports.py::test_the_figures_of_a_first_start"),
    ("tests/benchmark.py", "sections asked for are ignored", "for name in args.sections or SECTIONS:", "for name in SECTIONS:", "test_reports.py::test_the_benchmark_runs_the_sections_it_is_asked_for"),
    ("model.py", "eps is a constant", "self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)", "self.norm = RMSNorm(config.hidden_size, 1e-6)", "test_reports.py::test_eps_and_theta_of_the_config_are_used"),
    ("model.py", "activations are kept", "recomputed = self.activation_checkpointing and torch.is_grad_enabled()", "recomputed = self.activation_checkpointing and not torch.is_grad_enabled()", "test_reports.py::test_checkpointing_runs_each_block_again"),
    ("model.py", "large log-probs at once", "if len(hidden) * len(weight) > MANY or", "if len(hidden) > MANY or", "test_reports.py::test_never_more_logits_than_many_at_a_time"),
    ("model.py", "the feed-forward is rounded down", "-(-8 * width // 3 // 32) * 32", "(8 * width // 3 // 32) * 32", "test_reports.py::test_a_new_shape_is_llamas"),
    ("model.py", "numbers are not aligned", 'text += b" " * (-len(text) % 8)', 'text += b" " * (-len(text) % 1)', "test_reports.py::test_the_file_is_aligned_and_its_config_says_float32"),
    ("extra/weights.py", "a bin beside an index is read first", "            if where:\n", "            if where and not (directory / name).exists():\n", "test_reports.py::test_configs_of_others"),
    ("extra/checkpoints.py", "the special tokens are left behind", '"special_tokens_map.json", ', "", "test_reports.py::test_what_lies_beside_weights_goes_along"),
    ("extra/attention.py", "all segments are one group", "members[prompt_size > 0, like(size), like(prompt_size + size)]", "members[prompt_size > 0, 0, 0]", "test_reports.py::test_padding_of_attention_is_bounded"),
    ("extra/objectives.py", "dpop's alpha is 5", "def dpop(pairs, beta, alpha=50.0)", "def dpop(pairs, beta, alpha=5.0)", "test_reports.py::test_each_option_has_its_papers_default"),
    ("extra/objectives.py", "kto's z0 is negative, too", "z0 = beta * pairs.mean_logratio * (pairs.mean_logratio > 0)", "z0 = beta * pairs.mean_logratio", "test_objectives.py::test_mean_logratio_by_hand"),
    ("extra/objectives.py", "a swapped pair keeps its margin", "ref_chosen, other, length, -margin, mean)", "ref_chosen, other, length, margin, mean)", "test_objectives.py::test_a_soft_label_is_an_expectation"),
    ("extra/lora.py", "adapters of the wrong size", "a.shape[1] ** -0.5", "a.shape[0] ** -0.5", "test_lora.py::test_first_values"),
    ("model.py", "bf16 is cast before the norm", "        inputs = x, self.normalized_shape, self.weight.to(x.dtype), self.eps\n", "        if torch.is_autocast_enabled(x.device.type):\n            x = x.to(torch.get_autocast_dtype(x.device.type))\n        inputs = x, self.normalized_shape, self.weight.to(x.dtype), self.eps\n", "test_reports.py::test_bf16_is_of_products_alone"),
    ("model.py", "the logits stay in bf16", "return logits if logits.dtype == torch.float64 else logits.float()", "return logits", "test_model.py::test_token_logps_in_bfloat16"),
    ("extra/weights.py", "bin before safetensors", 'formats = "model.safetensors", "pytorch_model.bin"', 'formats = "pytorch_model.bin", "model.safetensors"', "test_checkpoints.py::test_shards_in_half_precision_as_distributed"),
    ("extra/checkpoints.py", "gelu is taken for silu", '("silu", "swish", None)', '("silu", "swish", "gelu", None)', "test_checkpoints.py::test_unusable_checkpoints_are_refused_by_name"),
    ("model.py", "a source's architecture is lost", 'f"{model.config.model_type.capitalize()}ForCausalLM"', '"LlamaForCausalLM"', "test_checkpoints.py::test_a_source_keeps_its_architecture"),
    ("model.py", "the embedding of a tied head is read twice", 'weights.pop("lm_head.weight", None)', 'weights.pop("head.weight", None)', "test_checkpoints.py::test_a_tied_head_that_is_there_twice_is_read_once"),
    ("model.py", "init is as wide for residual projections", "2 * len(self.layers) if residual", "len(self.layers) if residual", "test_model.py::test_initial_weights"),
    ("extra/attention.py", "a query sees the key after it", "mask = (key <= (prompt_size + query)", "mask = (key <= (prompt_size + query + 1)", "test_model.py::test_packed_shared_chunked_equals_plain"),
    ("extra/objectives.py", "cpo without the NLL", "(pairs.chosen - pairs.rejected)) - pairs.chosen / pairs.chosen_length", "(pairs.chosen - pairs.rejected))", "test_objectives.py::test_value_and_slope_at_initialisation"),
    ("extra/objectives.py", "fdpo_forward_kl has the default order", "return fdpo_alpha(pairs, beta, alpha=1.0)", "return fdpo_alpha(pairs, beta)", "test_objectives.py::test_identities"),
    ("extra/chunked.py", "chunks are too few", "count = -(-len(hidden) * len(weight) // model.MANY)", "count = max(1, len(hidden) * len(weight) // model.MANY)", "test_reports.py::test_never_more_logits_than_many_at_a_time"),
    ("extra/chunked.py", "the target at the end of a chunk is not found", "within <= last)", "within < last)", "test_reports.py::test_never_more_logits_than_many_at_a_time"),
    ("extra/chunked.py", "the target at the begin of a chunk is not found", "(within >= 0)", "(within > 0)", "test_reports.py::test_never_more_logits_than_many_at_a_time"),
    # Found by random patches, and by people who had not read the tests
    ("extra/kept.py", "every rank writes", "            if run.rank == 0 and path and time", "            if path and time", "test_settings.py::test_a_reference_pass_that_lasts_is_written_each_minute"),
    ("data.py", "a tokenizer without BOS is taken", "if min(self.bos_id, self.eos_id) < 0:", "if self.eos_id < 0:", "test_data.py::test_a_tokenizer_without_its_ends_is_refused"),
    ("extra/refusals.py", "--score without a reference passes", "if (args.score or args.best_of or args.kl) and not args.compare:", "if (args.best_of or args.kl) and not args.compare:", "test_sample_flags.py::test_a_reward_needs_a_reference"),
    ("extra/public.py", "a conversation may begin with the assistant", '"assistant" not in roles[1:] or roles[0] == "assistant"', '"assistant" not in roles[1:]', "test_formats.py::test_bad_rows_of_each_format_are_one_sentence"),
    ("extra/encoded.py", "texts are encoded one by one", "    if not examples:\n        return\n    prompts", "    if examples:\n        return\n    prompts", "test_data_path.py::test_files_of_many_blocks_keep_their_order"),
    ("extra/conversations.py", "text before the first turn of an HH transcript is lost silently", "if before.strip() else []", "if False else []", "test_formats.py::test_public_formats_as_distributed"),
    ("extra/public.py", "the sign of a strength is turned", "(second, first) if by > 0 else", "(second, first) if by < 0 else", "test_formats.py::test_data_sets_by_their_own_names_for_things"),
    ("extra/public.py", "the safer response is taken for the better", 'pick(answers, row["better_response_id"])', 'pick(answers, row["safer_response_id"])', "test_formats.py::test_data_sets_by_their_own_names_for_things"),
    ("extra/public.py", "ranks are taken for scores", 'texts, "rank", ranks, 1)', 'texts, "rank", ranks, -1)', "test_formats.py::test_data_sets_by_their_own_names_for_things"),
    ("extra/public.py", "of equal ranks all are kept", "if not kept or numbers[i] != numbers[kept[-1]]:", "if True:", "test_formats.py::test_rankings_hold_no_equals"),
    ("extra/public.py", "the beginning of a word is taken for a repeated prompt", "if prompt[-1].isalnum() and response", "if False and response", "test_formats.py::test_repeated_prompts_are_taken_out_and_counted"),
    ("extra/formats.py", "ties are learnt as if the first were better", "if found.margin == 0 and", "if found.margin < 0 and", "test_formats.py::test_ties_are_left_out_and_counted"),
    ("extra/formats.py", "a tie with a soft label is left out, too", 'row.get("soft_label") is None:', "True:", "test_formats.py::test_ties_are_left_out_and_counted"),
    ("extra/formats.py", "tools are dropped", "return context or None", "return None", "test_formats.py::test_messages_keep_what_a_template_may_read"),
    ("extra/conversations.py", "a system message is written twice", 'if turns[0]["role"] == "system" else None', "if False else None", "test_formats.py::test_what_stands_before_a_question"),
    ("extra/conversations.py", "arguments of a tool call stay JSON in a text", 'if isinstance(function.get("arguments"), str):', "if False:", "test_formats.py::test_messages_keep_what_a_template_may_read"),
    ("extra/conversations.py", "a message of weight 0 is learnt", "return bool(weight and all(flags))", "return all(flags)", "test_formats.py::test_turns_that_are_not_learnt_are_marked"),
    ("extra/conversations.py", "parts of a text are joined without a break", 'return "\\n".join(texts)', 'return "".join(texts)', "test_formats.py::test_roles_by_any_name_and_content_in_parts"),
    ("extra/files.py", "elements of an array are counted from 0", 'element {number}", element', 'element {number - 1}", element', "test_formats.py::test_arrays_are_read"),
    ("data.py", "what was made of rows is not counted", '["examples", *example.notes]', '["examples"]', "test_formats.py::test_repeated_prompts_are_taken_out_and_counted"),
    ("data.py", "fields beside three texts are dropped", 'if row.keys() - {"id", *names} or not', "if not", "test_data.py::test_what_is_not_plain_is_left_to_the_room"),
    ("extra/reward.py", "an empty answer in a chat is scored by the tokenizer's EOS, not by what ends a turn", "    end = tokenizer.eos_id\n    if data.is_turns(example.prompt):", "    end = tokenizer.eos_id\n    if data.is_turns(example.responses):", "test_sample_flags.py::test_who_says_nothing_in_a_conversation_ends_the_turn"),
    ("dpo.py", "the evaluation is of this rank's own share only", 'averages(run.total(sums), "eval")', 'averages(sums, "eval")', "test_train.py::test_several_ranks_equal_one[3-flags0]"),
    # The models of today, and adapters
    ("model.py", "the output projection of a Qwen2 has a bias", "self.o_proj = nn.Linear(width, config.hidden_size, bias=False)", "self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)", "test_checkpoints.py::test_models_of_today_are_those_of_transformers"),
    ("model.py", "keys are not normalised", "k, v = self.k_norm(heads(self.k_proj(x))), heads(self.v_proj(x))", "k, v = heads(self.k_proj(x)), heads(self.v_proj(x))", "test_checkpoints.py::test_models_of_today_are_those_of_transformers"),
    ("model.py", "norms of heads have an eps of their own", "norm(config.head_dim, config.rms_norm_eps) for _", "norm(config.head_dim, 1e-6) for _", "test_checkpoints.py::test_models_of_today_are_those_of_transformers"),
    ("model.py", "biases begin at one", 'parameter.fill_(0 if name.endswith("bias") else 1)', "parameter.fill_(1)", "test_model.py::test_initial_weights"),
    ("extra/checkpoints.py", "a Qwen3 without head_dim has hidden_size / heads", '"qwen3": QWEN | {"head_dim": 128},', '"qwen3": QWEN,', "test_checkpoints.py::test_what_a_config_leaves_out_is_as_in_transformers"),
    ("extra/checkpoints.py", "a Mistral has as many key-value heads as heads where it does not say", '        "num_key_value_heads": 8,\n', "", "test_checkpoints.py::test_what_a_config_leaves_out_is_as_in_transformers"),
    ("extra/checkpoints.py", "a window that is used is ignored", "first >= shape[\"num_hidden_layers\"])", "first >= 0)", "test_checkpoints.py::test_unusable_checkpoints_are_refused_by_name"),
    ("extra/checkpoints.py", "layers of any kind pass", 'if layer != "full_attention"]', "if not layer]", "test_checkpoints.py::test_unusable_checkpoints_are_refused_by_name"),
    ("extra/checkpoints.py", "fast dimensions are slowed down, too", "(kept + (1 - kept) / scaling[", "(0 * kept + 1 / scaling[", "test_reports.py::test_eps_and_theta_of_the_config_are_used"),
    ("model.py", "Llama 3's frequencies are not slowed down", "    if config.rope_scaling:\n", "    if False:\n", "test_reports.py::test_eps_and_theta_of_the_config_are_used"),
    ("extra/checkpoints.py", "rope_scaling and rope_parameters are mixed", "rope = ropes[0] or ropes[1]", "rope = ropes[1] | ropes[0]", "test_checkpoints.py::test_what_a_config_leaves_out_is_as_in_transformers"),
    ("extra/checkpoints.py", "a base is looked for in the working directory only", "for place in (places[-1] / name, Path(name)) if", "for place in (Path(name),) if", "test_adapters.py::test_what_peft_saves_is_read_as_peft_reads_it"),
    ("extra/checkpoints.py", "another run's template stays", "                (directory / name).unlink(missing_ok=True)  # another run's\n", "                pass\n", "test_adapters.py::test_a_tokenizer_is_that_of_the_adapters_or_of_their_base"),
    ("extra/adapters.py", "alpha is taken for the scale", 'given["lora_alpha"] / (rank', 'given["lora_alpha"] / (1 or rank', "test_adapters.py::test_what_peft_saves_is_read_as_peft_reads_it"),
    ("extra/adapters.py", "rslora's scale is the usual one", "rank**0.5 if", "rank if", "test_adapters.py::test_what_peft_saves_is_read_as_peft_reads_it"),
    ("extra/adapters.py", "adapters are saved at half of what they are", '"lora_alpha": 2 * s.lora_rank', '"lora_alpha": s.lora_rank', "test_adapters.py::test_what_train_saves_is_the_merged_model_in_peft"),
    ("extra/adapters.py", "what the config.json of peft says beyond is ignored", "and value not in OFF:", "and value in (1,):", "test_adapters.py::test_unusable_adapters_are_refused_by_name"),
    ("extra/adapters.py", "the base is named by --init_from though SFT made it", 'run.out / "sft" if s.sft_epochs and s.epochs else', 'run.out / "sft" if s.sft_epochs and not s.epochs else', "test_adapters.py::test_what_train_saves_is_the_merged_model_in_peft"),
    ("extra/adapters.py", "adapters are saved after they are merged", "    save(model, directory, run)  # first: once they are merged they begin anew\n    lora.merge(model, run.settings.seed)\n", "    lora.merge(model, run.settings.seed)\n    save(model, directory, run)\n", "test_adapters.py::test_what_train_saves_is_the_merged_model_in_peft"),
    ("extra/states.py", "another run's adapters stay", 'for place in (run.out / "resume", run.out / "adapter"):', 'for place in (run.out / "resume",):', "test_adapters.py::test_one_stage_hangs_its_adapters_on_the_checkpoint_it_starts_from"),
    ("extra/kept.py", "the base of adapters may change unnoticed", "for place in places_of(checkpoint) for", "for place in places_of(checkpoint)[:1] for", "test_adapters.py::test_one_stage_hangs_its_adapters_on_the_checkpoint_it_starts_from"),
    ("extra/cache.py", "an id beyond the vocabulary is a traceback", ">= c.vocab_size:", "> 10**9:", "test_checkpoints.py::test_vocabularies_of_another_size_than_the_tokenizers"),
    ("extra/refusals.py", "the base of --init_from may be overwritten", "overwritten & {*reads},", "overwritten & {*reads[:1]} and 0,", "test_settings.py::test_settings_that_contradict_each_other_are_refused"),
    # Scoring is evaluation; ids without a tokenizer; --resume, always given; long texts
    ("extra/reward.py", "--score drops what a run keeps: an example whose response is cut", "        tree = data.fit(whole, *limits, counts)\n", "        tree = data.fit(whole, limits[0] - 1, limits[1], counts)\n", "test_scoring.py::test_scoring_is_evaluation"),
    ("extra/reward.py", "--score ignores the run's limits", '    return [setting(args.checkpoint, name, 2**31, ": mend it") for name in names]\n', "    return [2**31 for name in names]\n", "test_scoring.py::test_scoring_is_evaluation"),
    ("extra/reward.py", "--score forgets the weights", "(example.weight, example.label, example.margin))\n", "(1.0, example.label, example.margin))\n", "test_scoring.py::test_scoring_is_evaluation"),
    ("extra/reward.py", "the log-probs are those under the reference", "own = torch.from_numpy(logps[batch.ids.numpy()])", "own = torch.from_numpy(dataset.reference[batch.ids.numpy()])", "test_scoring.py::test_scoring_is_evaluation"),
    ("extra/reward.py", "what was cut is not counted", "counts = Counter(examples=len(rows))\n    items = [encode_row(row, examples[where], tokenizer, limits, counts)", "counts = Counter(examples=len(rows))\n    items = [encode_row(row, examples[where], tokenizer, limits, Counter())", "test_scoring.py::test_scoring_is_evaluation"),
    ("extra/reward.py", "rows that are dropped are not written", "write(args.out, [row for _, row in rows])", "write(args.out, [item.row for item in items])", "test_scoring.py::test_a_row_is_written_for_each_row"),
    ("extra/reward.py", "an old reward stays in a row that is dropped", '        row["rewards"] = None\n', "        pass\n", "test_scoring.py::test_a_row_is_written_for_each_row"),
    ("extra/reward.py", "rewards of distinct responses in place of each", "each = [scores[item.places] for", "each = [scores for", "test_scoring.py::test_a_row_is_written_for_each_row"),
    ("extra/reward.py", "candidates that are equal once cut spoil their row", "        tree = fit_each(whole, limits, counts)\n", "        tree = data.fit(whole, *limits, counts)\n", "test_scoring.py::test_candidates_are_cut_by_themselves"),
    ("extra/reward.py", "a cut prompt counts for each candidate", 'min(1, found.pop("prompts cut", 0))', 'found.pop("prompts cut", 0)', "test_scoring.py::test_candidates_are_cut_by_themselves"),
    ("extra/reward.py", "equal candidates change places", 'np.argsort(-scores, kind="stable")', 'np.argsort(scores, kind="stable")[::-1]', "test_scoring.py::test_candidates_are_cut_by_themselves"),
    ("sample.py", "what config.json names does not end a text", "    stops = {eos} if isinstance(eos, int) else {*(eos or ())}\n", "    stops = {eos} if isinstance(eos, int) else set()\n", "test_scoring.py::test_ids_are_sampled_without_a_tokenizer"),
    ("sample.py", "a conversation ends by its template alone", "stops |= stop_ids(tokenizer)", "stops = stop_ids(tokenizer)", "test_scoring.py::test_a_conversation_ends_by_all_of_them"),
    ("extra/checkpoints.py", "generation_config.json adds no ends", "for file, value in ((path, own), (beside, more)):", "for file, value in ((path, own),):", "test_scoring.py::test_a_generation_config_adds_its_ends"),
    ("extra/checkpoints.py", "a saved config.json has the ends of both files", '        if "eos_token_id" in kept:  # ours', '        if "eos_token_id" in ():  # ours', "test_checkpoints.py::test_saving_keeps_what_the_source_says"),
    ("extra/cache.py", "a token beyond the vocabulary passes", ">= c.vocab_size:", "> c.vocab_size:", "test_scoring.py::test_text_is_refused_before_anything_is_printed"),
    ("extra/states.py", "paths are relative to where the run is resumed", 'for name in PATHS if point["cwd"] != here else ():', "for name in ():", "test_settings.py::test_a_resumed_run_finds_its_files_from_anywhere"),
    ("extra/refusals.py", "a mistyped directory begins a run", '    if not point and "data" not in given:\n', "    if False:\n", "test_scoring.py::test_the_same_contents_are_the_same_setting"),
    ("extra/refusals.py", "every process says where a run begins", 'first = os.environ.get("RANK", "0") == "0"', "first = True", "test_scoring.py::test_one_process_says_where_a_run_begins"),
    ("extra/guard.py", "the order of files does not count", '"".join(map(sha256, paths))', '"".join(sorted(map(sha256, paths)))', "test_settings.py::test_a_resumed_run_is_of_the_contents_that_it_began_with"),
    ("data.py", "without its room a line that is no JSON is an import that fails", "suppress(ImportError):\n        from extra.files", "suppress(KeyError):\n        from extra.files", "test_house.py::test_it_runs_without_its_rooms"),
    ("extra/states.py", "a run begins anew if no state is whole", "    if places and whole:\n", "    if False:\n", "test_scoring.py::test_the_same_contents_are_the_same_setting"),
    ("data.py", "long texts are left out of a tokenizer", 'if isinstance(t["content"], str) for p in split(t["content"]))', 'if isinstance(t["content"], str) for p in [t["content"]])', "test_scoring.py::test_long_texts_train_a_tokenizer"),
    ("data.py", "long texts are split within words", ".{1,1000}(?= |\\Z)|", ".{1,1000}|", "test_scoring.py::test_long_texts_train_a_tokenizer"),
    # Tokenizers of other programs, and what is learnt of chats
    ("extra/tokenizers.py", "a tokenizer.model is read though a tokenizer.json is beside it", 'is_json = (path / "tokenizer.json").is_file() if', 'is_json = not (path / "tokenizer.model").is_file() if', "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "a file is read as SentencePiece's whatever its name", 'else path.suffix == ".json"', "else False", "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "a token that text spells is found, and only then spelt", "opened[place].encode_special_tokens = True", "opened[place].encode_special_tokens = False", "test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("extra/tokenizers.py", "a model's own finding of control tokens is left as it is", "return self.spell_out([e.ids for e in encoded])", "return [e.ids for e in encoded]", "test_tokenizers.py::test_a_model_finds_control_tokens_that_are_not_special"),
    ("extra/tokenizers.py", "a named token that is not marked special is text", "if token.special or token.content in self.names.values():", "if token.special:", "test_tokenizers.py::test_a_model_finds_control_tokens_that_are_not_special"),
    ("extra/tokenizers.py", "special false makes text of a token that is named EOS", 'if token.get("special") is False and name not in self.names.values():', 'if token.get("special") is False:', "test_tokenizers.py::test_added_tokens_are_found_in_text_and_shown_in_text"),
    ("extra/tokenizers.py", "a token of which special is not said is found in text", 'if token.get("special") is False and', 'if not token.get("special") and', "test_data_path.py::test_what_is_learnt_of_a_conversation"),
    ("extra/tokenizers.py", "legacy is false where it is not said", 'config.get("legacy", True)', 'config.get("legacy", False)', "test_tokenizers.py::test_added_tokens_are_found_in_text_and_shown_in_text"),
    ("extra/tokenizers.py", "legacy does not count", 'spaced = place == "first" or (place == "after" and self.legacy)', 'spaced = place != "inside"', "test_tokenizers.py::test_the_space_after_control_tokens_is_as_legacy_says"),
    ("extra/tokenizers.py", "a chat's text that begins with a space gets another", '[self.inside if text.startswith(" ") else self.start for text in texts]', "[self.start for text in texts]", "test_tokenizers.py::test_the_space_after_control_tokens_is_as_legacy_says test_data_path.py::test_what_is_learnt_of_a_conversation"),
    ("extra/tokenizers.py", "what follows an added token is spaced as what was before it", "ids += (again if n else processor).encode(piece)", "ids += processor.encode(piece)", "test_tokenizers.py::test_added_tokens_are_found_in_text_and_shown_in_text"),
    ("extra/tokenizers.py", "added tokens are not shown", 'self.added_names.get(i, "")', '""', "test_tokenizers.py::test_added_tokens_are_found_in_text_and_shown_in_text"),
    ("extra/tokenizers.py", "the space after an added token is shown as if it were text", "                processor, run = self.start if self.legacy else self.inside, []\n", "                run = []\n", "test_tokenizers.py::test_added_tokens_are_found_in_text_and_shown_in_text"),
    ("extra/tokenizers.py", "added tokens count only where they are in added_tokens_decoder", '        self.control |= added\n', "", "test_chat.py::test_chat_templates[added]"),
    ("extra/tokenizers.py", "after a control token Metaspace's first puts a space", '(first or place == "inside")', '(place == "inside")', "test_tokenizers.py::test_the_space_is_put_where_the_file_puts_it test_tokenizers.py::test_chats_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "within a text Metaspace's always puts a space", '(first or place == "inside")', 'first', "test_tokenizers.py::test_the_space_is_put_where_the_file_puts_it test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("extra/tokenizers.py", "Prepend puts nothing after a control token", '        if place == "inside":\n            steps = [', '        if True:\n            steps = [', "test_tokenizers.py::test_chats_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "Prepend puts a space inside of a text", 'step["type"] not in ("Prepend", "Strip")]', 'step["type"] not in ("Strip",)]', "test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("extra/tokenizers.py", "ByteLevel's prefix is put inside of a text", 'if step["type"] == "ByteLevel" and place == "inside":', 'if step["type"] == "ByteLevel" and place == "":', "test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("extra/tokenizers.py", "a response loses its first space when it is decoded", 'step["type"] not in ("Prepend", "Strip")]', 'step["type"] not in ("Prepend",)]', "test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("extra/tokenizers.py", "texts are cut as the file says", 'spec |= {"truncation": None, "padding": None}', 'spec |= {"padding": None}', "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "texts are padded as the file says", 'spec |= {"truncation": None, "padding": None}', 'spec |= {"truncation": None}', "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "a text begins with BOS if there is one, not as the post-processor has it", "self.opening = processed[: next(starts, 0)]", "self.opening = [self.bos_id] * (self.bos_id is not None)", "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("extra/tokenizers.py", "tokenizer_config.json always comes before special_tokens_map.json", "special | config if is_new else config | special", "special | config", "test_tokenizers.py::test_what_cannot_be_read_is_one_sentence"),
    ("extra/tokenizers.py", "special_tokens_map.json is not read", "token = special.get(name)", "token = config.get(name)", "test_tokenizers.py::test_what_cannot_be_read_is_one_sentence"),
    ("extra/tokenizers.py", "a control token takes no space before it", 'r"\\s*" * token.lstrip', 'r"" * token.lstrip', "test_tokenizers.py::test_tokens_that_take_the_space_beside_them"),
    ("extra/tokenizers.py", "a control token takes no space after it", 'r"\\s*" * token.rstrip', 'r"" * token.rstrip', "test_tokenizers.py::test_tokens_that_take_the_space_beside_them"),
    ("extra/tokenizers.py", "the model's own EOS ends no answer where the files name another", "        self.stops.append(self.eos_id)  # the", "        # the", "test_chat.py::test_chat_templates"),
    ("extra/tokenizers.py", "a tokenizer without EOS is read", "if self.eos_id is None:", "if False:", "test_tokenizers.py::test_what_cannot_be_read_is_one_sentence"),
    ("extra/tokenizers.py", "control tokens are shown as text", "if i < self.vocab_size and i not in self.control_ids]", "if i < self.vocab_size]", "test_tokenizers.py::test_responses_continue_their_prompts_exactly test_tokenizers.py::test_a_model_finds_control_tokens_that_are_not_special"),
    ("extra/tokenizers.py", "only several ends in generation_config.json count", "if isinstance(stops, list) else [stops]", "if isinstance(stops, list) else []", "test_tokenizers.py::test_a_tuned_checkpoint_is_whole_in_transformers"),
    ("extra/chat.py", "the EOS of an open answer that is not to be learnt is", "Part([self.tokenizer.eos_id], hidden)]", "Part([self.tokenizer.eos_id])]", "test_chat.py::test_turns_that_are_not_to_be_learnt test_chat.py::test_every_answer_ends"),
    ("extra/chat.py", "answers in our own template do not end", " + m.content + (eos_token if m.role == 'assistant' else '') }}", " + m.content }}", "test_chat.py::test_a_plain_template_writes_transcripts_as_they_are"),
    ("extra/chat.py", "a prompt that ends within an answer is a finished answer", 'if not answer or turns[-1]["role"] != "assistant":\n            return', "if True:\n            return", "test_chat.py::test_an_answer_that_is_begun_is_continued"),
    ("extra/chat.py", "a continuation is rendered as a turn of its own", 'if i == 0 and answer and turns[-1]["role"] == "assistant":', "if False:", "test_chat.py::test_an_answer_that_is_begun_is_continued"),
    ("extra/chat.py", "a turn that the template leaves out is continued all the same", "        if not mark:\n", "        if False:\n", "test_chat.py::test_an_answer_that_is_begun_is_continued"),
    ("extra/chat.py", "train: false is learnt", 'hidden = turn.get("train") is False', "hidden = False", "test_chat.py::test_turns_that_are_not_to_be_learnt"),
    ("extra/chat.py", "what follows the end of an answer is learnt", "return ended.end(1) if ended else len(said)", "return len(said)", "test_chat.py::test_chat_templates"),
    ("extra/chat.py", "conversations of two answers are not taken apart", "len(answers_in(example.responses[0])) < 2:", "len(answers_in(example.responses[0])) < 3:", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/chat.py", "each of the separate answers brings the ones after it", "responses=(turns[i : i + 1],)", "responses=(turns[i:],)", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/chat.py", "an answer that is not learnt counts as one that is", 'if turns[i].get("train") is not False:', "if True:", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/chat.py", "of a rewritten demonstration only the last answer is learnt", "if len(example.responses) == 1 and len(answers_in(example.responses[0])) > 1:", "if False:", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/chat.py", "what two rewritten answers do not share is learnt", "[p._replace(hidden=True) for p in head[len(shared) :]]", "[p for p in head[len(shared) :]]", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/chat.py", "rewritten answers share the whole of the first one's history", "itertools.takewhile(same, zip(*heads))", "zip(*heads)", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/chat.py", "tools may be left out by the template", 'used = {"tools"} if context.get("tools") else set()', "used = set()", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "calls may be left out by the template", '("tool_calls", "reasoning_content", "thinking")', '("reasoning_content", "thinking")', "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "reasoning may be left out by the template", '("tool_calls", "reasoning_content", "thinking")', '("tool_calls",)', "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "what tools answer may be left out by the template", 'used |= {"tool"} if whole == without else set()', "pass", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "only the prompt's turns are looked at for what is left out", "turns = [*example.prompt, *response]\n        used", "turns = example.prompt\n        used", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "a rendered text begins without BOS", "            sequences[0].insert(0, opening)  # as texts begin\n", "            pass\n", "test_chat.py::test_text_that_a_template_wrote"),
    ("extra/chat.py", "what a rendered answer ends with is doubled", "        ended = parts and not isinstance(parts[-1].content, str)\n", "        ended = False\n", "test_chat.py::test_text_that_a_template_wrote"),
    ("extra/chat.py", "what follows the end of a rendered answer is learnt", "self.split(text[ended:], True) if text", "self.split(text[ended:]) if text", "test_chat.py::test_text_that_a_template_wrote"),
    ("extra/chat.py", "a rendered text without a prompt has two BOS", "if not example.prompt and parts[:1] == [opening]:", "if False:", "test_chat.py::test_text_that_a_template_wrote"),
    ("extra/chat.py", "tools may spell control tokens", "self.guard(example.context)\n        answer = ", "example.context\n        answer = ", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "names in tools may spell control tokens", "{self.guard(key): self.guard(inner)", "{key: self.guard(inner)", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "a spelt control token is broken up in the space before it", 're.sub(r"(?<=\\S)", GUARD, match[0], count=1)', "match[0][:1] + GUARD + match[0][1:]", "test_tokenizers.py::test_tokens_that_take_the_space_beside_them"),
    ("extra/templates.py", "each rendering asks for the date anew", "time.strftime(form, now)", "time.strftime(form, time.localtime())", "test_chat.py::test_a_date_is_that_of_the_start"),
    ("extra/chat.py", "only lists of turns are guarded, not what is inside of them", "return [self.guard(inner) for inner in value] if isinstance(value, list) else value", "return value", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "chat_template_kwargs are handed over as one thing", 'given |= given.pop("chat_template_kwargs", None) or {}', 'given.pop("", None)', "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/chat.py", "a response begins as it would stand first in a prompt", "last = last or before  # of the prompt", "last = last", "test_tokenizers.py::test_the_space_after_control_tokens_is_as_legacy_says test_data_path.py::test_what_is_learnt_of_a_conversation"),
    ("extra/chat.py", "the second response follows the first", "last = last or before  # of the prompt", "last = before", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/chat.py", "a boundary is looked for as if each prompt began a sequence", "head[-1].content, response[0].content, head[-1].place", 'head[-1].content, response[0].content, "first"', "test_tokenizers.py::test_the_space_after_control_tokens_is_as_legacy_says"),
    ("extra/chat.py", "a boundary is looked for with the response as a text of its own", '("inside", after), (place, before + after)', '("first", after), (place, before + after)', "test_doctor.py::test_boundaries_that_a_joint_encoding_merges"),
    ("extra/chat.py", "an empty answer has a boundary", "if not (head and response):\n            return False", "if not head:\n            return False", "test_doctor.py::test_boundaries_that_a_joint_encoding_merges"),
    ("extra/chat.py", "generation_config.json ends no answer", "end_of_turn(tokenizer), *tokenizer.stops}", "end_of_turn(tokenizer)}", "test_tokenizers.py::test_a_tuned_checkpoint_is_whole_in_transformers"),
    ("extra/templates.py", "the date is that of each rendering", "time.strftime(form, now)", "time.strftime(form)", "test_chat.py::test_a_date_is_that_of_the_start"),
    ("extra/templates.py", "templates write JSON in ASCII", "functools.partial(json.dumps, ensure_ascii=False)", "json.dumps", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/templates.py", "tokens of chats are not those of transformers: blocks keep their newlines", "trim_blocks=True, lstrip_blocks=True", "trim_blocks=False, lstrip_blocks=True", "test_chat.py::test_chat_templates"),
    ("extra/encoded.py", "what was made of a row is counted for each of its answers", "[other._replace(notes=()) for other in others]", "others", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/encoded.py", "what was made of a conversation's row is not counted", "notes=(*example.notes, chat.CHATS)", "notes=(chat.CHATS,)", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/encoded.py", "what templates leave out is not said", "        chat.check_written(example, tokenizer)\n", "", "test_chat.py::test_what_a_message_carries_is_handed_to_the_template"),
    ("extra/encoded.py", "control tokens are looked for in prompts alone", "texts = (example.prompt, *example.responses)\n            if any", "texts = (example.prompt,)\n            if any", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/encoded.py", "texts that a template wrote are said to be kept texts", "        if is_chat(example, tokenizer):\n", "        if data.is_turns(example.prompt):\n", "test_chat.py::test_text_that_a_template_wrote"),
    ("extra/encoded.py", "a conversation is learnt from once, whatever its template does", "first, *others = chat.separate(example, tokenizer)", "first, *others = [example]", "test_chat.py::test_a_template_that_rewrites_earlier_turns"),
    ("extra/encoded.py", "a prompt without ids is left as it is", "[[*tokenizer.opening, *prompt] or [tokenizer.eos_id]]", "[[*tokenizer.opening, *prompt]]", "test_tokenizers.py::test_a_list_is_encoded_as_each_alone"),
    ("extra/checkpoints.py", "whatever was trained, the template is saved", 'chats = any(CHATS in read_json(place / "counts.json") for place in sets)', "chats = True", "test_tokenizers.py::test_a_base_checkpoint_learns_our_template_with_the_chats"),
    ("extra/checkpoints.py", "a new model has a template only if it was trained on chats", "chats or not s.init_from)", "chats)", "test_checkpoints.py::test_a_new_tokenizer_is_saved_with_what_others_want"),
    ("extra/checkpoints.py", "a checkpoint's own template is replaced by ours", "if chats and not tokenizer.template:", "if chats:", "test_tokenizers.py::test_a_tuned_checkpoint_is_whole_in_transformers"),
    ("extra/checkpoints.py", "what ends a turn is not said to generate", "*([end_of_turn(tokenizer)] if chats else []), ", "", "test_tokenizers.py::test_what_ends_an_answer_is_saved"),
    ("extra/checkpoints.py", "what generation_config.json ends with is forgotten", "if chats else []), *tokenizer.stops, *own]", "if chats else []), *own]", "test_tokenizers.py::test_a_tuned_checkpoint_is_whole_in_transformers"),
    ("extra/checkpoints.py", "the rest of generation_config.json is forgotten", 'content = read_json(path) if path.is_file() else {"bos', 'content = {"bos', "test_tokenizers.py::test_a_tuned_checkpoint_is_whole_in_transformers"),
    ("extra/checkpoints.py", "generation_config.json is written though config.json says it all", 'if content.get("eos_token_id") not in (ends, said):', "if True:", "test_tokenizers.py::test_a_base_checkpoint_learns_our_template_with_the_chats"),
    ("extra/checkpoints.py", "a new tokenizer is saved as not legacy", '"legacy": True, "add_bos_token": True}', '"legacy": False, "add_bos_token": True}', "test_tokenizers.py::test_a_new_chat_model_is_the_same_in_transformers"),
    ("extra/checkpoints.py", "generation_config.json is that of the tokenizer", 'beside = base_of(source) if name == "generation_config.json" else with_tokenizer(source)', "beside = with_tokenizer(source)", "test_adapters.py::test_a_tokenizer_is_that_of_the_adapters_or_of_their_base"),
    ("extra/checkpoints.py", "another tokenizer.json stays beside a tokenizer.model", "            (directory / name).unlink(missing_ok=True)  # another run's, which", "            pass  #", "test_tokenizers.py::test_a_new_model_has_the_tokenizer_that_it_is_given"),
    ("extra/checkpoints.py", "what lies beside --tokenizer stays there", "if not (tokenizer and (beside / name).is_file()):", "if True:", "test_tokenizers.py::test_a_new_model_has_the_tokenizer_that_it_is_given"),
    ("extra/checkpoints.py", "another run's template stays with a new model", "                (directory / name).unlink(missing_ok=True)\n            elif", "                pass\n            elif", "test_tokenizers.py::test_a_new_model_has_the_tokenizer_that_it_is_given"),
    ("extra/checkpoints.py", "a checkpoint with tokenizer.json alone has no tokenizer", 'for name in ("tokenizer.json", "tokenizer.model"))', 'for name in ("tokenizer.model",))', "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("extra/checkpoints.py", "the tokenizer of adapters is looked for beside them only", "    place = with_tokenizer(directory)\n    if not any", "    place = Path(directory)\n    if not any", "test_adapters.py::test_a_tokenizer_is_that_of_the_adapters_or_of_their_base"),
    ("data.py", "each tokenizer is a plain SentencePiece model", "find_class(path) if cls is Tokenizer else cls", "find_class(path) and cls", "test_tokenizers.py::test_texts_are_as_the_packages_have_them"),
    ("data.py", "one example that a template wrote is encoded as text", "if is_turns(prompt) or tokenizer.rendered:", "if is_turns(prompt):", "test_chat.py::test_text_that_a_template_wrote"),
    ("data.py", "a prompt begins with BOS, whatever texts begin with", "[[*tokenizer.opening, *tokenizer.encode(prompt)] or", "[[tokenizer.bos_id, *tokenizer.encode(prompt)] or", "test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("data.py", "a response without a prompt is read after nothing", "[[*tokenizer.opening, *tokenizer.encode(prompt)] or [tokenizer.eos_id]]", "[[*tokenizer.opening, *tokenizer.encode(prompt)]]", "test_tokenizers.py::test_responses_continue_their_prompts_exactly"),
    ("extra/kept.py", "the ends of an answer are part of the key", "config = replace(model.config, bos_token_id=None, eos_token_id=None)", "config = model.config", "test_settings.py::test_a_reference_is_found_again_by_whatever_it_depends_on"),
    ("train.py", "--rendered does not reach the tokenizer", "tokenizer.rendered = s.rendered", "tokenizer.rendered = Settings.rendered", "test_settings.py::test_a_setting_acts_as_it_says_and_changes_nothing_else[rendered=true]"),
    ("train.py", "a tokenizer.json is saved as tokenizer.model", 'directory / f"tokenizer{tokenizer.path.suffix}"', 'directory / "tokenizer.model"', "test_tokenizers.py::test_a_new_model_has_the_tokenizer_that_it_is_given"),
    ("extra/formats.py", "an answer that says nothing is learnt before others", 'return [turn | {"train": False} if silent(turn) else turn for turn in turns]', "return turns", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/formats.py", "an answer that only calls a tool is none", "if said_nothing(turns):", 'if not turns[-1]["content"]:', "test_formats.py::test_messages_keep_what_a_template_may_read"),
    ("extra/formats.py", "others' turns that say nothing are marked", 'turn["role"] == "assistant" and said_nothing([turn])', "said_nothing([turn])", "test_data_path.py::test_every_row_reaches_its_batch"),
    ("extra/checkpoints.py", "texts of a rendered run are read as text afterwards", '    tokenizer.rendered = setting(directory, "rendered", False)\n', "", "test_cases.py::test_a_run_on_rendered_texts_is_sampled_and_scored_as_it_was_trained"),
    ("extra/checkpoints.py", "the reference of a rendered run is not", 'if places[0].resolve().name in ("sft", "adapter"):', "if False:", "test_cases.py::test_a_run_on_rendered_texts_is_sampled_and_scored_as_it_was_trained"),
    ("extra/checkpoints.py", "what ends rendered texts is not written", '            tokenizer.stops += learnt_ends(sets, tokenizer)\n', "            pass\n", "test_cases.py::test_a_run_on_rendered_texts_is_sampled_and_scored_as_it_was_trained"),
    ("extra/checkpoints.py", "several ends are not written where no file has any", "not in (ends, said)", "not in (ends, said, None)", "test_cases.py::test_ends_are_written_where_no_file_has_any"),
    ("extra/chat.py", "an answer ends where the conversation does", "self.turn_end = re.compile(tokenizer.control_pattern.pattern + beyond)", 'self.turn_end = re.compile(tokenizer.control_pattern.pattern + r"\\s*$")', "test_cases.py::test_the_end_of_a_conversation_is_not_that_of_a_turn"),
    ("extra/chat.py", "thoughts that the template leaves out are dropped without a word", 'any("</think>" in turn["content"] for', 'any("</thought>" in turn["content"] for', "test_cases.py::test_thoughts_that_no_answer_would_keep_are_refused"),
    ("extra/doctor.py", "a conversation of several sequences is looked at as one", "in several or [example])", "in [example])", "test_cases.py::test_the_doctor_looks_at_conversations_whose_thoughts_are_dropped"),
    ("extra/public.py", "an empty answer at the end takes the others with it", "said = [i for i in answers if not said_nothing([turns[i]])] or answers[:1]", "said = answers", "test_cases.py::test_an_empty_answer_at_the_end_takes_nothing_with_it"),
    ("extra/tokenizers.py", "config.json does not name the ends of a tokenizer.json", 'ids = beside.get(f"{name}_id")', "ids = None", "test_cases.py::test_a_tokenizer_json_may_be_named_by_the_config_of_its_model"),
    ("data.py", "a bad row is a failure of the trained tokenizer", "                raise DataError(said[1]) from None\n", "                pass\n", "test_cases.py::test_a_bad_row_is_named_while_a_tokenizer_is_trained"),
    # Files of a checkpoint, which are hostile until checked
    ("extra/reading.py", "a pipe is read as a file", "    if not stat.S_ISREG(status.st_mode):\n", "    if False:\n", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[config-FIFO]"),
    ("extra/reading.py", "NaN is read as JSON", "\"parse_float\": finite, \"parse_constant\": finite}", "\"parse_float\": finite}", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[config-NaN]"),
    ("extra/reading.py", "a megabyte is quoted as it is", "    if len(text) <= most:\n", "    if len(text) <= most**9:\n", "test_hostile_checkpoints.py::test_values_are_quoted_shortly"),
    ("extra/weights.py", "the header's length is believed", "        if length > min(size - 8, HEADER):\n", "        if length > HEADER:\n", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[header-beyond]"),
    ("extra/weights.py", "weights may overlap", "        if begin != end:\n", "        if begin > end:\n", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[offsets-shared]"),
    ("extra/weights.py", "what is beyond the last weight does not count", "    if 8 + length + end != size:\n", "    if 8 + length + end > size:\n", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[file-longer]"),
    ("extra/weights.py", "an index may lead out of its directory", "is_name = file == Path(file).name and", "is_name =", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence"),
    ("extra/weights.py", "what an index promises is not looked for", "        if missing := promised - found.keys():\n", "        if missing := ():\n", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[index-lost-weight]"),
    ("extra/weights.py", "integers of a bin are weights", "        if weight.dtype not in DTYPES.values():\n", "        if weight.dtype is None:\n", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence"),
    ("extra/weights.py", "a bin may be compressed", "if any(part.compress_type != zipfile.ZIP_STORED for part in parts):", "if not parts:", "test_hostile_checkpoints.py::test_each_bad_checkpoint_is_one_sentence[bin-compressed]"),
    ("extra/checkpoints.py", "a NaN hides in a sum that is looked at alone", "    return bool(x.sum().isfinite()) or bool(x.isfinite().all())\n", "    return bool(x.sum().isfinite())\n", "test_hostile_checkpoints.py::test_the_first_weight_that_is_not_finite"),
    ("extra/tokenizers.py", "ids of added tokens are those of the package, whatever the file says", "            if ids.get(name) != i:\n", "            if name not in ids:\n", "test_hostile_checkpoints.py::test_each_bad_tokenizer_is_one_sentence[json-id-other]"),
    # What keeps a run from harm, and its states
    ("dpo.py", "a step is taken whatever its gradient is", "    if usable:\n", "    if True:\n", "test_guard.py::test_a_step_that_is_not_finite_is_as_if_it_had_not_been[flags0-gradient]"),
    ("dpo.py", "a step is judged by its loss alone", 'torch.isfinite(norm + sums["loss"])', 'torch.isfinite(sums["loss"])', "test_guard.py::test_a_step_that_is_not_finite_is_as_if_it_had_not_been[flags0-gradient] test_guard.py::test_ten_in_a_row_end_the_run"),
    ("dpo.py", "the gradient of a step that is skipped stays", "        optimizer.step()\n    optimizer.zero_grad()", "        optimizer.step()\n        optimizer.zero_grad()", "test_guard.py::test_a_step_that_is_not_finite_is_as_if_it_had_not_been[flags0-gradient]"),
    ("train.py", "a step that is not finite is not counted", "        if not sums:\n            run.skip", "        if False:\n            run.skip", "test_guard.py::test_a_step_that_is_not_finite_is_as_if_it_had_not_been[flags0-gradient]"),
    ("extra/states.py", "sums since the last row are lost", 'Counter(run.point["totals"])', "Counter()", "test_guard.py::test_sums_between_two_rows_survive_a_kill[13-dpo-4]"),
    ("extra/states.py", "the mean log-ratio is lost", '    run.mean_logratio.fill_(run.point["mean_logratio"])\n', "", "test_guard.py::test_a_run_that_is_stopped_loses_nothing[take_step-15-dpo-7]"),
    ("extra/states.py", "an evaluation is recorded once more when its step is resumed", "    while rows and is_look(", "    while False and is_look(", "test_states.py::test_a_signal_saves_a_state"),
    ("extra/states.py", "the row of training is taken for a look at its step", '    return same and not any(name.startswith("train/") for name in row)\n', "    return same\n", "test_states.py::test_a_state_has_no_look_at_its_own_step"),
    ("extra/states.py", "steps that were skipped are forgotten", 'run.skipped = run.point.get("skipped", {})', "run.skipped = {}", "test_guard.py::test_a_run_that_is_stopped_loses_nothing[take_step-15-dpo-7]"),
    ("extra/states.py", "a run that is done is resumed from before its end", '["done"] if made else []', "[]", "test_guard.py::test_a_finished_run_that_is_resumed_says_so_and_changes_nothing"),
    ("extra/states.py", "a run that is done needs not have its weights", '["done"] if made else []', '["done"]', "test_metrics.py::test_a_resumed_run_goes_on_as_if_it_had_not_stopped"),
    ("extra/states.py", "relative paths are read from where the run is resumed", 'os.path.join(point["cwd"], path)', "path", "test_scoring.py::test_the_same_contents_are_the_same_setting"),
    ("extra/states.py", "an older state is taken for the newest", "sorted(found, reverse=True)", "sorted(found)", "test_guard.py::test_ten_in_a_row_end_the_run test_guard.py::test_sums_between_two_rows_survive_a_kill[13-dpo-4]"),
    ("extra/states.py", "states are ordered as words are", "found.append((stages.index(stage), int(step), path))", "found.append((stages.index(stage), step, path))", "test_states.py::test_the_newest_state_is_the_furthest"),
    ("extra/guard.py", "data that is gone is not missed", "if found.get(name) != before.get(name):", "if name in found and found[name] != before.get(name):", "test_scoring.py::test_the_same_contents_are_the_same_setting"),
    ("extra/guard.py", "the order of files does not count", '"".join(map(sha256, paths))', '"".join(sorted(map(sha256, paths)))', "test_scoring.py::test_the_same_contents_are_the_same_setting"),
    ("extra/guard.py", "a checkpoint is known by its weights alone", 'kinds = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")', 'kinds = (".safetensors", ".bin")', "test_scoring.py::test_the_same_contents_are_the_same_setting"),
    ("extra/guard.py", "another tokenizer is taken", '"sft_data", "tokenizer", "init_from"):\n        paths', '"sft_data", "init_from"):\n        paths', "test_guard.py::test_another_tokenizer_is_refused"),
    ("extra/guard.py", "nine steps in a row end the run", "steps[-10:] == [*range(step - 9, step + 1)]", "steps[-9:] == [*range(step - 8, step + 1)]", "test_guard.py::test_ten_in_a_row_end_the_run"),
    ("extra/guard.py", "ten steps end the run, in a row or not", "steps[-10:] == [*range(step - 9, step + 1)]", "len(steps) >= 10", "test_guard.py::test_ten_in_a_row_end_the_run"),
    ("extra/guard.py", "the lines that are named are the first of the file", "train.where[examples]", "train.where[: len(examples)]", "test_guard.py::test_a_step_that_is_not_finite_is_as_if_it_had_not_been[flags0-gradient]"),
    ("extra/guard.py", "a checkpoint that is not finite is said to have diverged", "if steps in ([-1], [*range(10)]):", "if False:", "test_guard.py::test_a_checkpoint_that_is_not_finite"),
    ("extra/guard.py", "weights that are not a number are saved", "if not size < LARGE:", "if size >= LARGE:", "test_guard.py::test_how_large_weights_may_be"),
    ("extra/guard.py", "the norm of all weights counts, not its mean", "size = norm / sum(weight.numel() for weight in weights) ** 0.5", "size = norm", "test_guard.py::test_how_large_weights_may_be"),
    ("extra/guard.py", "adapters are not merged before they are saved", "    if run.settings.lora_rank:\n        from", "    if not run.settings.lora_rank:\n        from", "test_guard.py::test_adapters_are_merged_before_a_model_is_saved"),
    ("extra/guard.py", "a loss that rose did not move", "abs(losses[-1] - losses[0]) <", "losses[0] - losses[-1] <", "test_guard.py::test_which_losses_are_compared"),
    ("extra/guard.py", "the loss of another stage is compared", 'if row["stage"] == rows[-1]["stage"]]', 'if row["stage"]]', "test_guard.py::test_which_losses_are_compared"),
    ("extra/guard.py", "a run that is stopped saves nothing", "        run.save()\n", "", "test_guard.py::test_a_run_that_is_stopped_loses_nothing[take_step-7-sft-7]"),
    ("extra/guard.py", "only SIGTERM is a request to stop", "SIGNALS = (signal.SIGTERM, signal.SIGINT)", "SIGNALS = (signal.SIGTERM,)", "test_states.py::test_a_signal_saves_a_state"),
    ("extra/lora.py", "DPO goes on with SFT's A", "        copy_rows(parameters[name], first)", '        copy_rows(parameters[name], first) if ".lora.1" in name else None', "test_train.py::test_resume_is_bit_identical test_metrics.py::test_each_stage_can_be_run_alone test_lora.py::test_adapters_are_the_merged_model"),
    ("extra/lora.py", "adapters begin anew with another seed", "first_values(model, seed).items():", "first_values(model, seed + 1).items():", "test_metrics.py::test_each_stage_can_be_run_alone test_lora.py::test_adapters_are_the_merged_model"),
    ('extra/states.py', 'only the last state is kept', 'if old.name not in (place.name, before):', 'if old.name != place.name:', 'test_states.py::test_a_damaged_state_is_passed_over[gone]'),
    ('extra/states.py', 'the digests of a state are not compared', ' or sha256(file) != digest:', ':', 'test_states.py::test_a_damaged_state_is_passed_over[flipped]'),
    ('extra/states.py', 'of damaged states the settings are taken', 'names = ("point.json", "metrics.jsonl", *manifest) if whole else ("point.json",)', 'names = ("point.json", "metrics.jsonl", *manifest) if whole else ()', 'test_states.py::test_a_flipped_bit_of_a_setting_is_noticed'),
    ('extra/guard.py', 'no loop sees the signal', 'asked = run.signal', 'asked = 0', 'test_states.py::test_a_signal_saves_a_state'),
    ('extra/guard.py', "a launcher's second signal at once ends the run", 'if first and time.monotonic() - first > 1:', 'if first:', 'test_states.py::test_a_second_signal_ends_at_once'),
    ('extra/guard.py', 'the lock is let go at once', 'run.lock = hold(run.out)', 'hold(run.out)', 'test_states.py::test_a_directory_is_locked_for_the_life_of_a_run'),
    ('extra/guard.py', 'each rank looks at its own signal only', 'if run.world > 1 and together:', 'if False:', 'test_states.py::test_a_signal_on_two_ranks'),
    # experiments/exact.py
    ('experiments/exact.py', 'best of n as if no two rewards tied', 'np.diff(np.minimum(mass.cumsum(), 1) ** n, prepend=0)', 'n * mass * mass.cumsum() ** (n - 1)', 'test_exact.py::test_best_of_n_is_that_of_all_reviews'),
    ('experiments/exact.py', 'levels are not told apart below a half', 'np.round(rewards, 6)', 'np.round(rewards)', 'test_exact.py::test_best_of_n_is_that_of_all_reviews'),
    ('experiments/exact.py', 'a reward model that sees no tastes', '[w for w in words if w in ADVERBS] + [(kind, words[-1])]', '[w for w in words if w in ADVERBS] + [words[-1]]', 'test_exact.py::test_features_are_those_of_the_texts'),
    ('experiments/exact.py', "a review that has ended goes on with another's clause", 'np.concatenate([*found, np.zeros((1, found[0].shape[1]))])', 'np.concatenate(found)', 'test_exact.py::test_features_are_those_of_the_texts'),
    ('experiments/exact.py', 'the prior pulls the wrong way', 'gradient = x.T @ wrong - ridge * theta', 'gradient = x.T @ wrong + ridge * theta', 'test_exact.py::test_the_fit_is_the_maximum_and_finds_the_truth'),
    ('experiments/exact.py', 'KL from the true reward in place of the learned one', 'counts @ learned / beta - log_total', 'counts @ true / beta - log_total', 'test_exact.py::test_tilt_is_that_of_all_reviews'),
    ('experiments/exact.py', 'exp(r/β) overflows', 'np.exp((learned - learned.max()) / beta)\n    z =', 'np.exp(learned / beta) / np.exp(learned.max() / beta)\n    z =', 'test_exact.py::test_tilt_by_the_true_reward_is_the_optimum'),
    ('experiments/exact.py', 'the number of clauses stays as it was', '        weights = np.log(COUNTS) + log_z\n', '        weights = np.log(COUNTS) + log_z.mean()\n', 'test_exact.py::test_tilt_by_the_true_reward_is_the_optimum'),
    ('experiments/exact.py', 'wrong labels only weaken, and never turn round', 'flip + (1 - 2 * flip) /', 'flip / 2 + (1 - flip) /', 'test_exact.py::test_dpo_limit_is_where_the_loss_of_all_pairs_ends'),
    ('experiments/exact.py', "the table's labels are all right", 'pairs = flip_labels(Reviews(seed).preferences(max(known), "train"), flip, seed)', 'pairs = Reviews(seed).preferences(max(known), "train")', 'test_exact.py::test_the_table_has_these_figures'),
    # The report of a sweep, and of anybody's runs
    ("experiments/report.py", "a point may lie four standard errors above the frontier", "if excess > 2 * error + 1e-3:", "if excess > 4 * error + 1e-3:", "test_report.py::test_a_point_above_the_frontier_is_found"),
    ("experiments/report.py", "an error of KL does not count where a point is above the frontier", "error = math.hypot(reward_error, best(kl + kl_error) - best(kl))", "error = reward_error", "test_report.py::test_a_point_above_the_frontier_is_found"),
    ("experiments/runs.py", "two seeds that agree by chance have no error", "float(max(own, spread))", "float(spread if count > 1 else own)", "test_report.py::test_a_point_above_the_frontier_is_found"),
    ("experiments/runs.py", "a bootstrap interval of few seeds is too narrow", "widen = (count / (count - 1)) ** 0.5 * student / 1.96", "widen = 1.0", "test_report.py::test_intervals_hold_the_mean_as_often_as_they_say"),
    ("experiments/report.py", "a method is compared with DPO beyond DPO's KL", "np.interp(kl, kls, gaps, left=math.nan, right=math.nan)", "np.interp(kl, kls, gaps)", "test_report.py::test_compared_with_dpo_at_the_same_kl"),
    ("experiments/report.py", "a run is compared with DPO of other seeds", '            if s == seed\n', "", "test_report.py::test_compared_with_dpo_at_the_same_kl"),
    ("experiments/report.py", "a run that still goes on counts as if it had ended", 'for row in read_rows(directory / "metrics.jsonl") if (directory / "done").exists() else ():', 'for row in read_rows(directory / "metrics.jsonl"):', "test_report.py::test_what_is_said_of_a_sweep"),
    ("experiments/report.py", "rewards fitted to flipped labels stand for those of the right ones", 'places["flips main" if flips else "main"]', 'places["main"]', "test_report.py::test_what_is_said_of_a_sweep"),
    ("experiments/reviews.py", "R*(KL) ends before there is no more to gain", "np.geomspace(1e5, 0.05, 300)])", "np.geomspace(1e5, 0.5, 300)])", "test_exact.py::test_the_curves_are_what_a_figure_needs"),
    ("experiments/runs.py", "files within the runs' directories make other settings of them", "removeprefix(own) if", 'removeprefix("") if', "test_report.py::test_own_runs_from_the_command_line"),
    ("experiments/runs.py", "a run that is named twice counts twice", "directories = list({path.resolve(): path for path in directories}.values())", "directories = list(directories)", "test_report.py::test_own_runs_from_the_command_line"),
    ("experiments/runs.py", "equal runs whose directories have one name are seeds of one", "run.name if names[run.name] == 1 else run", "run.name", "test_report.py::test_equal_runs_are_told_apart_by_where_they_are"),
    ("experiments/report.py", "the headline mixes seeds with few settings and with all", "if len(rows) == len(own)}", "if rows}", "test_report.py::test_the_headline_is_of_seeds_with_all_settings"),
    ("experiments/exact.py", "of many pairs the seeds that are left out are not", "        if known:\n", "        if True:\n", "test_exact.py::test_many_pairs_are_of_three_seeds"),
    ("experiments/frontier.py", "what other settings made is in the report until it is made anew", "                    (out / name).unlink(missing_ok=True)\n", "                    pass\n", "test_frontier.py::test_a_sweep_is_made_once_and_goes_on"),
    ("experiments/frontier.py", "a run of another learning rate counts", '"rate": RATE, ', "", "test_frontier.py::test_a_sweep_is_made_once_and_goes_on"),
    ("experiments/replaced.py", "RLOO's seconds leave its reward model out", "clock() - began + (learning if model else 0.0)", "clock() - began", "test_rlhf.py::test_seconds_are_of_what_each_needs"),
    ("experiments/replaced.py", "best of n is billed for all samples", "learning + drawing * n / 16", "learning + drawing", "test_rlhf.py::test_seconds_are_of_what_each_needs"),
    ("experiments/replaced.py", "another loss's run is tabulated as DPO", 'if settings.get("loss") != "dpo" or', "if", "test_rlhf.py::test_what_is_no_run_is_one_sentence"),
    ("experiments/reviews.py", "without SFT the experiment trains from nothing", "if not (settings.sft_epochs or settings.init_from):", "if False:", "test_reports.py::test_mistakes_are_sentences"),
    ("experiments/reviews.py", "rows without candidates are labelled", "if str(prompt) not in prompts or not fine:", "if str(prompt) not in prompts:", "test_reports.py::test_mistakes_are_sentences"),
    ("extra/guard.py", "a mistyped path is found once the last run's rows are gone", "        refuse_missing(run.settings)\n", "        pass\n", "test_guard.py::test_a_mistyped_path_costs_no_run"),
    ("train.py", "the built-in experiment is known by one spelling alone", "    if given.data == Settings.data:\n", "    if not any(word.startswith('--data') and word != '--data=reviews' for word in arguments):\n", "test_settings.py::test_the_experiment_sets_what_the_command_line_does_not"),
    ("experiments/runs.py", "a torn last line of the metrics is refused", "if number < len(lines):", "if number:", "test_report.py::test_own_runs_from_the_command_line"),
    ("experiments/figure.py", "the figure's bytes depend on when it was drawn", 'metadata={"Date": None, "Creator": None}', 'metadata={"Creator": None}', "test_report.py::test_what_is_said_of_a_sweep"),
    ("experiments/figure.py", "a method's name stands where no policy can be", "cost += 1000 * (y > self.bound(x))", "cost += 0 * (y > self.bound(x))", "test_report.py::test_names_stand_beside_their_points"),
    # Samples during training, model cards, Apple's GPU
    ("extra/samples.py", "no sample after the last step", "if step % every and step != steps:", "if step % every:", "test_samples.py::test_they_are_those_of_the_checkpoints[text-more0]"),
    ("extra/samples.py", "each rank stops where all of its answers end", "(), seed=run.settings.seed)", "[2], seed=run.settings.seed)", "test_samples.py::test_it_stays_within_what_the_model_has_seen"),
    ("extra/samples.py", "what follows the end of an answer is shown", "return ids[: end + 1]", "return ids", "test_samples.py::test_they_are_those_of_the_checkpoints[ids-more2]"),
    ("extra/samples.py", "another seed each time", "seed=run.settings.seed)", "seed=torch.seed())", "test_samples.py::test_they_are_those_of_the_checkpoints[text-more0]"),
    ("extra/samples.py", "samples of the state's own step stay when it is resumed", "return when(json.loads(line)) < when(point)", "return when(json.loads(line)) <= when(point)", "test_samples.py::test_a_resumed_run_has_each_once"),
    ("extra/samples.py", "of what is learnt, though there is held-out data", '("eval_pairs" if s.eval_data else "pairs")', '"pairs"', "test_samples.py::test_they_are_those_of_the_checkpoints[text-more0]"),
    ("extra/samples.py", "one prompt, again and again", "found[tuple(dataset.tokens[dataset[e][0]].tolist())] = None", "found[e, *dataset.tokens[dataset[e][0]].tolist()] = None", "test_samples.py::test_which_prompts"),
    ("extra/samples.py", "compiled blocks are compiled anew for samples", 'eager = torch.compiler.set_stance("force_eager")', "pass", "test_samples.py::test_compiled_blocks_are_left_alone"),
    ("extra/states.py", "a new run leaves another's samples", 'rewind(run.out / "samples.jsonl", point)', 'rewind(run.out / "samples.jsonl", point) if point else None', "test_samples.py::test_a_resumed_run_has_each_once"),
    ("extra/cache.py", "the cache is sharded as the weights are", "torch.zeros(shape, dtype=dtype, device=weight.device)", "weight.new_zeros(shape, dtype=dtype)", "test_train.py::test_several_ranks_equal_one[3-flags0]"),
    ("extra/card.py", "somebody's own README.md is overwritten", "if os.path.lexists(path) and not is_ours(path):", "if False:", "test_card.py::test_somebodys_own_is_left_alone"),
    ("extra/card.py", "a link that leads nowhere is overwritten", "os.path.lexists(path)", "os.path.exists(path)", "test_card.py::test_somebodys_own_is_left_alone"),
    ("extra/card.py", "a name may end its code", 'marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))', 'marks = "`"', "test_card.py::test_it_is_one_line_each"),
    ("extra/card.py", "a name may end its cell", 'cell.replace("|", "\\\\|")', "cell", "test_card.py::test_it_says_what_was_done"),
    ("extra/card.py", "another run counts as a base on the hub", "HUB.fullmatch(init_from) and not of_a_run", "HUB.fullmatch(init_from)", "test_card.py::test_adapters_and_bases"),
    ("extra/card.py", "the first metrics in place of the last", 'found[kind] = f"{value:.6g}"', 'found.setdefault(kind, f"{value:.6g}")', "test_card.py::test_it_says_what_was_done"),
    ("extra/checkpoints.py", "the SFT model gets the card, too", "    if directory == run.out:\n        from extra import card", "    if True:\n        from extra import card", "test_card.py::test_it_says_what_was_done"),
    ("extra/guard.py", "memory on macOS is counted in KiB", 'unit = 1 if sys.platform == "darwin" else 2**10', "unit = 2**10", "test_metrics.py::test_rates_count_training_alone"),
    ("dpo.py", "float64 on Apple's GPU", 'return x if x.device.type == "mps" else x.double()', "return x.double()", "test_devices.py::test_double_is_float64_but_on_apples_gpu"),
    ("dpo.py", "SFT's metrics are float64 wherever", '"count": double(batch.learnt.sum())', '"count": batch.learnt.sum().double()', "test_devices.py::test_a_run_makes_no_float64_but_on_the_cpu"),
    ("train.py", "several processes on Apple's GPU", 'other = "mps" if mps and self.world == 1 else "cpu"', 'other = "mps" if mps else "cpu"', "test_devices.py::test_it_is_taken_where_it_is"),
    ("data.py", "copies go on unwaited for where memory is not pinned", "non_blocking=pinned", "non_blocking=True", "test_devices.py::test_only_cuda_copies_while_it_works"),
]
# fmt: on
MUTATIONS = [Mutation(*entry) for entry in MISTAKES]


def copy_project(to: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    for pattern in ("*.py", "*.md", "*.toml"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, to)
    return to


def run_pytest(names: list[str], copy: Path):
    """In a process of its own, forked from one that has imported torch; exits as pytest does."""
    os.setsid()
    os.chdir(copy)
    sys.path[:] = [place for place in sys.path if not Path(place).is_relative_to(ROOT)]
    sys.dont_write_bytecode = True
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    import pytest

    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly"]
    sys.exit(pytest.main([*options, *(f"tests/{name}" for name in names)]))


def run_tests(names: list[str], copy: Path) -> int:
    """pytest's exit status: 0 where all pass, 1 where one fails, else it could not be run."""
    process = PROCESSES.Process(target=run_pytest, args=(names, copy))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return 1
    return process.exitcode


def judge(mutation: Mutation, copies: queue.Queue) -> str:
    """What the tests say of a mistake, in one of the copies, which is put back as it was."""
    copy = copies.get()
    file = copy / mutation.file
    original = file.read_bytes()
    try:
        file.write_text(mutation.applied(), encoding="utf-8")
        status = run_tests(mutation.tests.split(), copy)
    finally:
        file.write_bytes(original)
        copies.put(copy)
    return {0: SURVIVED, 1: CAUGHT}.get(status, BROKEN)


def digests(mutations: list[Mutation]) -> dict[Mutation, str]:
    """Of each mistake together with all code and tests, which decide whether it is noticed."""
    files = [file for folder in ("", *FOLDERS) for file in sorted((ROOT / folder).glob("*.py"))]
    code = hashlib.sha256()
    for file in files:
        if file != Path(__file__):
            code.update(file.read_bytes())
    state = code.hexdigest()
    return {m: hashlib.sha256(f"{state} {m}".encode()).hexdigest() for m in mutations}


def main():
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("words", nargs="*", help="only the entries that mention all of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if all(word in " ".join(m) for word in args.words)]
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    keys = digests(chosen)
    left = [mutation for mutation in chosen if known.get(keys[mutation], BROKEN) == BROKEN]
    with tempfile.TemporaryDirectory() as directory:
        copies = queue.Queue()
        for n in range(args.jobs):
            copies.put(copy_project(Path(directory) / str(n)))
        names = sorted({name for mutation in left for name in mutation.tests.split()})
        if left and run_tests(names, copies.queue[0]):
            sys.exit("mutations.py: these tests must pass before any mistake is made")
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            judged = {pool.submit(judge, mutation, copies): mutation for mutation in left}
            for done in concurrent.futures.as_completed(judged):
                mutation, verdict = judged[done], done.result()
                known[keys[mutation]] = verdict
                RESULTS.write_text(json.dumps(known, indent=0), encoding="utf-8")
                print(f"{verdict:9} {mutation.file}: {mutation.what}", flush=True)
    survivors = [mutation for mutation in chosen if known[keys[mutation]] != CAUGHT]
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} mistakes were caught")
    for mutation in survivors:
        print(f"{known[keys[mutation]]}: {mutation.file}: {mutation.what}")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(["torch", "transformers", "sentencepiece", "pytest"])
    main()
