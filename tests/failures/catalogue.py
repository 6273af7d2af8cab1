"""The ways in which today's tools lose runs, row by row, and the test that shows what onward does instead.

A row that needs many ranks, another tool or something that onward does not offer yet says what it waits for.
docs/failures.md ends with this table.
"""

from __future__ import annotations

from dataclasses import dataclass

HERE = "tests/failures/test_failures_"
EXACTNESS = "tests/exactness/test_exactness_"
CHECKPOINT = "tests/checkpoint/test_checkpoint_"
DATA = "tests/data/test_data_"
MERGE = "tests/weights/test_weights_merge.py::"


@dataclass(frozen=True)
class Row:
    """What goes wrong elsewhere, and either `wins` with the `test` that shows it, or what it `waits` for."""

    number: int
    wrong: str
    wins: str = ""
    test: str = ""
    waits: str = ""


SECTIONS: dict[str, tuple[Row, ...]] = {
    "Weights, optimizer, learning rate": (
        Row(
            1,
            "the loss jumps after resuming and nothing says which part is wrong",
            "checkpoints carry a probe, a loss on fixed samples; another value on continuing stops the run",
            EXACTNESS + "damage.py::test_a_tensor_altered_with_a_corrected_digest_is_caught_by_the_probe",
        ),
        Row(
            2,
            "one of optimizer and scheduler is missing, so both are begun anew",
            "the file is named, the newest verified checkpoint before it is used, and this is said",
            HERE + "weights.py::test_row_02_a_missing_optimizer_is_never_a_fresh_one",
        ),
        Row(
            3,
            "the schedule's horizon is not saved and comes from the new arguments",
            "the rate is a function of plan and step; the plan is locked",
            HERE + "weights.py::test_row_03_the_learning_rate_follows_the_plans_formula_across_kills",
        ),
        Row(
            4,
            "a new learning rate or weight decay is ignored",
            "refused by name; with --accept it holds from this step on and is recorded",
            HERE + "changes.py::test_row_04_a_new_learning_rate_is_refused_by_name",
        ),
        Row(
            5,
            "another batch or accumulation re-interprets the step that was reached",
            "a step is one global batch: another one is refused, another micro-batch changes no step",
            HERE + "changes.py::test_row_05_another_batch_size_is_refused",
        ),
        Row(
            6,
            "resuming trains nothing and reports success",
            "it says that 0 steps were trained, also in --json",
            HERE + "weights.py::test_row_06_nothing_left_to_do_is_said",
        ),
        Row(
            7,
            "the rate restarts where one library owns the optimizer and another the schedule",
            "one owner: each step's rate is computed and set in the loop",
            HERE + "weights.py::test_row_07_the_rate_that_is_recorded_is_the_optimizers",
        ),
        Row(
            8,
            "the rate is frozen: the schedule holds on to groups of another optimizer",
            "no object outlives a start; every step's rate after the kill is that of the formula",
            HERE + "weights.py::test_row_03_the_learning_rate_follows_the_plans_formula_across_kills",
        ),
        Row(
            9,
            "the fp16 loss scale is lost, steps overflow and are skipped",
            "the scale is state; an overflowed step is tried again and is no step of the schedule",
            EXACTNESS + "methods.py::test_killed_between_an_overflow_and_the_next_try",
        ),
        Row(
            10,
            "after freezing or unfreezing the groups no longer fit the saved state",
            "what trains is part of the lock; a checkpoint with other names is refused with the name",
            HERE + "weights.py::test_row_10_state_of_a_parameter_that_no_longer_trains_is_named",
        ),
        Row(
            11,
            "groups are matched by position: a swap gives one layer's momentum and rate to another",
            "state is keyed by parameter name",
            HERE + "weights.py::test_row_11_state_follows_the_name_not_the_position",
        ),
        Row(
            12,
            "optimizer state is cast on loading",
            "dtypes are verbatim, compared after a round trip",
            HERE + "weights.py::test_row_12_state_keeps_its_dtype",
        ),
        Row(
            13,
            "8-bit and paged optimizers cannot be resumed, or turn into others",
            "their state is kept verbatim by parameter name; an optimizer of another name is another training",
            EXACTNESS + "methods.py::test_killed_before_at_and_after",
        ),
        Row(
            14,
            "the optimizer's step count is not restored",
            "it is a tensor like the others; the killed run ends with the same one",
            HERE + "weights.py::test_row_14_the_optimizers_own_step_count_is_restored",
        ),
        Row(15, "sharded optimizer state is wrong or cannot be loaded", waits="FSDP"),
        Row(16, "the moving average is lost or begun anew", waits="EMA"),
        Row(
            17,
            "a missing shard of the master weights leaves random ones",
            "all files or nothing: a checkpoint without its weights is not used",
            HERE + "files.py::test_row_17_a_checkpoint_without_its_weights_is_not_used",
        ),
        Row(
            18,
            "weights are loaded non-strictly: what is missing stays as it was",
            "names, shapes and dtypes must be exactly those that train",
            HERE + "weights.py::test_row_18_a_missing_weight_is_an_error",
        ),
        Row(
            19,
            "a wrapper's prefix in the names makes every key unknown",
            "checkpoints have the names of the plain model, whatever wraps it",
            HERE + "weights.py::test_row_19_names_on_disk_are_the_models_own",
        ),
        Row(
            20,
            "what was meant to be resumed is read as weights only",
            "an output is not a checkpoint: it is refused as one",
            HERE + "files.py::test_row_20_an_output_cannot_be_resumed",
        ),
    ),
    "LoRA and QLoRA": (
        Row(
            21,
            "the adapter is ignored on resuming, or loaded and then replaced",
            "killed in a LoRA stage, the run ends with the adapter of the run that was not",
            HERE + "weights.py::test_row_21_the_adapter_goes_on_where_it_was",
        ),
        Row(
            22,
            "no key of the adapter fits, and a fresh one trains",
            "keys must cover what trains exactly",
            HERE + "weights.py::test_row_22_renamed_adapter_keys_are_an_error",
        ),
        Row(
            23,
            "the adapter is in inference mode: nothing trains",
            "a group without a gradient stops the run by name",
            HERE + "weights.py::test_row_23_a_group_that_does_not_learn_stops_the_run",
        ),
        Row(
            24,
            "the adapter goes on over another base model",
            "the base's content is in the lock and in every checkpoint",
            HERE + "changes.py::test_row_24_another_base_is_refused",
        ),
        Row(
            25,
            "alpha, dropout or scaling drift from what the adapter was trained with",
            "refused by name",
            HERE + "changes.py::test_row_25_another_alpha_is_refused",
        ),
        Row(
            26,
            "an initialisation that rewrites the base (PiSSA, OLoRA) makes the adapter meaningless without it",
            "the base is never written; an adapter of that kind is refused by name",
            MERGE + "test_what_is_not_plain_lora_is_refused_by_name",
        ),
        Row(
            27,
            "only the first of several adapters is looked at",
            "adapters of earlier stages are carried by name and end in the last output",
            EXACTNESS + "variants.py::test_the_last_output_holds_all_that_was_carried",
        ),
        Row(
            28,
            "an adapter is written empty",
            "what is handed on is reopened from disk and compared with what trained",
            HERE + "weights.py::test_row_36_a_merge_that_lost_the_adapter_is_not_handed_on",
        ),
        Row(
            29,
            "added tokens and resized embeddings are lost between training and loading",
            "the tokenizer is part of the lock; an embedding in the adapter takes its base's place",
            MERGE + "test_an_embedding_that_comes_with_the_adapter_stands_in_for_the_bases",
        ),
        Row(
            30,
            "modules trained in full are lost in the merge",
            "a merge uses every trained tensor or fails and names it",
            MERGE + "test_every_tensor_of_the_adapter_is_used_or_named",
        ),
        Row(
            31,
            "a head trained apart from its tied embedding is overwritten when the merge is loaded",
            "refused before anything is written",
            MERGE + "test_a_copy_trained_apart_from_its_tied_twin_is_refused",
        ),
        Row(
            32,
            "a merge into 4-bit weights rounds the training away",
            "a quantised weight is refused as the base of a merge",
            MERGE + "test_a_quantised_weight_is_refused",
        ),
        Row(
            33,
            "the merge's base is not the quantised one that trained",
            "either is to be had; how far weights and logits are from what was trained is told for both",
            EXACTNESS + "lora.py::test_the_drift_of_either_base_is_told_and_what_was_taken_is_what_was_made",
        ),
        Row(
            34,
            "the merge changes the dtype, or unmerging leaves rounding behind",
            "fp32 sum, one cast to the tensor's own dtype; the base is never touched",
            MERGE + "test_every_type_gets_the_fp32_sum_cast_once",
        ),
        Row(
            35,
            "parts come back in another dtype than they trained in",
            "the manifest has each tensor's dtype, and it must be the one that trains",
            HERE + "weights.py::test_row_35_a_tensor_of_another_dtype_is_an_error",
        ),
        Row(
            36,
            "the merged model loads as if it had not been merged",
            "the output is reopened from disk and its logits compared with those that trained",
            HERE + "weights.py::test_row_36_a_merge_that_lost_the_adapter_is_not_handed_on",
        ),
        Row(
            37,
            "several adapters are combined by wrong arithmetic",
            "they are added one after the other, with the bits of PEFT's",
            MERGE + "test_several_adapters_are_merged_one_after_the_other_as_peft_does",
        ),
        Row(
            38,
            "the best checkpoint cannot be loaded when it is an adapter",
            "it is a checkpoint like any other, also after kills",
            EXACTNESS + "variants.py::test_killed_in_each_stage",
        ),
    ),
    "Parts and stages": (
        Row(
            39,
            "a part that is not found, a projector say, is initialised at random",
            "a tensor that the model needs and no file has is an error with its name",
            "tests/model/test_model_load.py::test_a_tensor_that_is_not_as_it_must_be_is_named",
        ),
        Row(
            40,
            "a first stage saves its projector alone and cannot be resumed",
            "a checkpoint has what the stage trains with its optimizer state; outputs are something else",
            EXACTNESS + "kill.py::test_killed_once_in_each_stage",
        ),
        Row(
            41,
            "the second stage resumes with the first one's optimizer",
            "a checkpoint names its stage and is no other's",
            HERE + "files.py::test_row_41_another_stages_checkpoint_is_not_used",
        ),
        Row(
            42,
            "the checkpoint's configuration overrides what the stage was to freeze",
            "what trains comes from the plan, is locked, and another set is refused",
            HERE + "changes.py::test_row_42_another_set_of_trained_modules_is_refused",
        ),
    ),
    "Position in the data": (
        Row(
            43,
            "from the second epoch on the order is another one",
            "the order is a function of seed, epoch and data",
            HERE + "data.py::test_row_43_every_epoch_has_its_own_order_and_the_same_after_a_kill",
        ),
        Row(
            44,
            "batches are skipped in an order that has been drawn anew",
            "the step is the position; no step after a kill sees other samples",
            HERE + "data.py::test_row_44_no_step_after_a_kill_sees_other_samples",
        ),
        Row(
            45,
            "chance in the data set depends on when and by which worker it is asked",
            "an augmentation draws from the sample's place alone",
            DATA + "batches.py::test_any_start_and_any_workers_give_the_same",
        ),
        Row(
            46,
            "skipping to the position takes hours",
            "no earlier row is read",
            DATA + "batches.py::test_start_late_reads_no_earlier_row",
        ),
        Row(
            47,
            "without skipping, data that was seen is seen again",
            "each epoch has every sample once, kills or not",
            HERE + "data.py::test_row_47_each_epoch_has_every_sample_once",
        ),
        Row(
            48,
            "micro-batches and steps are confused in what is counted",
            "one unit, the optimizer step; the micro-batch moves no sample",
            HERE + "data.py::test_row_48_the_micro_batch_moves_no_sample",
        ),
        Row(
            49,
            "what was skipped once is skipped in each later epoch",
            "killed in the first epoch, the later ones are whole",
            HERE + "data.py::test_row_47_each_epoch_has_every_sample_once",
        ),
        Row(50, "a stream loses its place, at the latest on the second resume", waits="streaming"),
        Row(
            51,
            "samples that workers had fetched are lost",
            "killed with two workers and continued with none, nothing changes",
            EXACTNESS + "kill.py::test_workers_change_nothing",
        ),
        Row(
            52,
            "packs are cut otherwise after a change of seed, length or version",
            "rows are packed within one step, whatever the micro-batch: a step has the same samples and the same loss",
            EXACTNESS + "data.py::test_packing_may_be_switched_while_a_run_goes_on",
        ),
        Row(
            53,
            "the data set is another one, and nobody notices",
            "its content is in the lock: refused",
            HERE + "changes.py::test_row_53_other_data_is_refused",
        ),
        Row(
            54,
            "the seed is another one, and nobody notices",
            "refused by name",
            HERE + "changes.py::test_row_54_another_seed_is_refused",
        ),
        Row(55, "buffers of reinforcement learning are not saved", waits="reinforcement learning"),
    ),
    "Files, crashes, rotation": (
        Row(
            56,
            "a partial checkpoint is chosen by its number",
            "a directory without a manifest is no checkpoint; it is passed over and named",
            HERE + "files.py::test_row_56_a_partial_checkpoint_is_passed_over",
        ),
        Row(
            57,
            "a save is neither staged nor synced",
            "killed at any write, or by a power cut, the run goes on from a whole checkpoint",
            EXACTNESS + "every_write.py::test_killed_at_some_writes",
        ),
        Row(
            58,
            "a mark says that a checkpoint is incomplete, and nothing reads it",
            "what is being written has a name that no reader looks at",
            HERE + "files.py::test_row_58_what_is_being_written_is_not_read",
        ),
        Row(
            59,
            "a truncated state file ends in a traceback",
            "it is named, and the checkpoint before it used",
            HERE + "files.py::test_row_59_a_truncated_progress_file_is_named",
        ),
        Row(
            60,
            "no checksum: a flipped bit trains on",
            "every byte is compared with its digest before it is used",
            HERE + "files.py::test_row_60_a_flipped_bit_in_any_file_is_found",
        ),
        Row(
            61,
            "a truncated optimizer is an error of the archive format",
            "the file is named with the size that it has and the one that was written",
            HERE + "files.py::test_row_61_a_truncated_optimizer_is_named_with_both_sizes",
        ),
        Row(
            62,
            "rotation deletes the wrong checkpoint",
            "only this run's own, only when a verified newer one stands, whatever names and times say",
            HERE + "files.py::test_row_62_rotation_believes_neither_names_nor_times",
        ),
        Row(
            63,
            "a higher number from an older run is taken for the newest",
            "a checkpoint names its run",
            HERE + "files.py::test_row_63_a_higher_number_of_another_run_is_passed_over",
        ),
        Row(
            64,
            "old checkpoints are deleted before the new one is written",
            "nothing goes that no verified newer one supersedes",
            CHECKPOINT + "retention.py::test_nothing_goes_that_no_verified_newer_one_supersedes",
        ),
        Row(
            65,
            "files of an earlier save stay in the directory",
            "each save has a fresh directory; a file that the manifest does not know is damage",
            HERE + "files.py::test_row_65_a_file_from_elsewhere_is_reported",
        ),
        Row(
            66,
            "the path of the best checkpoint is dead after a move",
            "paths are relative: a run that was moved goes on",
            EXACTNESS + "changes.py::test_a_run_may_be_moved_with_all_it_needs",
        ),
        Row(
            67,
            "an asynchronous save is announced before it is durable, or replaces what was good",
            "it is announced when it is durable, and retention waits for that; a kill costs it and nothing else",
            EXACTNESS + "background.py::test_a_kill_while_a_save_is_in_flight_costs_that_save_alone",
        ),
        Row(68, "ranks see different directories on a network file system and wait for each other", waits="many ranks"),
        Row(69, "a rename in an object store is not atomic", waits="object stores"),
        Row(
            70,
            "a full disk leaves empty files beside the good ones",
            "space is checked first; the last checkpoint stands, and the run goes on from it",
            EXACTNESS + "disk_full.py::test_full_at_some_writes",
        ),
        Row(
            71,
            "the output directory is wiped",
            "a directory that is no run is refused and left as it is",
            HERE + "changes.py::test_row_71_somebody_elses_directory_is_left_alone",
        ),
        Row(
            72,
            "with nothing to resume training begins from scratch, in silence",
            "a run that had committed a step and has no checkpoint left is refused",
            HERE + "files.py::test_row_72_a_run_that_lost_its_checkpoints_does_not_begin_again",
        ),
        Row(
            73,
            "tied weights are saved once and loaded untied, or the other way round",
            "tied is what the files and the model say together; a tied weight stays tied",
            MERGE + "test_a_tied_weight_stays_tied",
        ),
    ),
    "Many ranks": (
        Row(
            74,
            "a checkpoint is refused without saying what it lacks",
            "inspect names what is missing, the likely cause and the command that comes next",
            "tests/foreign/test_foreign_inspect.py::test_what_is_missing_is_named_with_its_cause",
        ),
        Row(75, "another number of ranks cannot load the state", waits="many ranks"),
        Row(
            76,
            "another ZeRO stage cannot load the state",
            "ZeRO 1, 2 and 3 are read by parameter name into one format, from any number of ranks",
            "tests/foreign/test_foreign_continue_deepspeed.py::test_ten_steps_further_the_weights_are_deepspeed_s",
        ),
        Row(77, "shards stay on the nodes that wrote them", waits="many ranks"),
        Row(
            78,
            "a rank's random state is missing, or another rank's",
            "there is no random state: dropout after a kill is a function of seed and step",
            HERE + "data.py::test_row_78_there_is_no_random_state_to_lose",
        ),
        Row(
            79,
            "newer torch refuses the pickles in old checkpoints",
            "safetensors and JSON alone",
            HERE + "files.py::test_row_79_a_run_holds_no_pickle",
        ),
    ),
    "Control, logs, environment": (
        Row(
            80,
            "logs double or drop the steps that were trained twice",
            "every step stands once in the canonical metrics",
            HERE + "data.py::test_row_80_every_step_stands_once_in_the_metrics",
        ),
        Row(
            81,
            "the mean loss covers only what was trained since the last start",
            "its sums are part of the checkpoint",
            HERE + "data.py::test_row_81_the_sums_of_the_loss_go_on_across_kills",
        ),
        Row(
            82,
            "what was the best so far, or how long nothing improved, is forgotten",
            "it is part of the checkpoint: early stopping ends at the same step",
            EXACTNESS + "early_stopping.py::test_interrupted_one_evaluation_before_its_end_it_ends_at_the_same_step",
        ),
        Row(
            83,
            "the signal before preemption is ignored, or saves half a step",
            "the step is finished and saved, exit 75, and the same command continues it",
            EXACTNESS + "signals.py::test_signal_saves_at_the_end_of_the_step",
        ),
        Row(
            84,
            "a library is another version, and nobody notices",
            "refused by name; accepted, the promise is a lower one and says so",
            HERE + "changes.py::test_row_84_another_library_version_is_refused",
        ),
        Row(
            85,
            "the chat template or tokenizer is another one, and nobody notices",
            "their content is in the lock: refused",
            HERE + "changes.py::test_row_85_another_chat_template_is_refused",
        ),
    ),
}


def rows() -> list[Row]:
    return [row for section in SECTIONS.values() for row in section]


def catalogue_lines() -> list[str]:
    """The catalogue as Markdown."""
    tested = sum(bool(row.test) for row in rows())
    lines = [
        "",
        "## The catalogue",
        "",
        f"{len(rows())} ways to lose a run that were measured in today's tools, read in their source, or reported by "
        f"their users. {tested} have a test here; the others wait for something that onward does not offer.",
    ]
    for section, found in SECTIONS.items():
        lines += ["", f"### {section}", "", "| | elsewhere | onward | test |", "|---|---|---|---|"]
        for row in found:
            test = f"`{row.test.removeprefix('tests/')}`" if row.test else ""
            lines.append(f"| {row.number} | {row.wrong} | {row.wins or f'waits for: {row.waits}'} | {test} |")
    return lines
