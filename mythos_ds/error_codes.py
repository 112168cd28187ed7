"""Every code of an error or of a rule of the configuration: what it means and, of the commonest, cause and cure.

Plain data, read by tests and by what writes docs/troubleshooting.md, never while a program starts. The first digit is
the subject. A code keeps its meaning: one that is retired is not given to something else.
"""

from textwrap import fill
from typing import NamedTuple


class Code(NamedTuple):
    """What a code says, in one line; `cause` and `cure` of the commonest ones."""

    title: str
    cause: str = ""
    cure: str = ""


SUBJECTS = {
    "0": "Any command",
    "1": "The configuration and the command line",
    "2": "Rules between settings",
    "4": "Data and tokenizers",
    "5": "Checkpoints and weights",
    "6": "What is written",
    "7": "Processes and machines",
    "8": "Numbers that are not finite",
    "9": "Studies and measurements",
}
"""By the first digit of a code."""

CODES = {
    "MDS000": Code("Another error that the message explains"),
    "MDS001": Code(
        "A fault of this program",
        "The program met something that it does not expect; the message names the file that holds the traceback.",
        "Report it with that file. `--debug` prints the traceback on the screen.",
    ),
    "MDS002": Code(
        "A file cannot be read or written",
        "The operating system refused: no such file, no permission, a full disk, or a file system that is gone.",
        "Check the path that the message begins with, its owner and the free space (`df -h`).",
    ),
    "MDS003": Code(
        "Out of memory",
        "A GPU's memory, or the machine's, does not hold what was asked for.",
        "Lower `training.micro_batch_size` (the global batch stays as it is) or `training.seq_len`; set "
        '`parallel.activation_checkpointing` to "layer"; raise `parallel.zero_stage` to 3, or offload. `mythos-ds '
        "plan` says what a layout takes. For conversions: fewer `--jobs`.",
    ),
    "MDS004": Code(
        "An optional package is not installed",
        "The feature needs a package that a plain installation leaves out.",
        "Run the pip command of the message, in the environment that runs mythos-ds.",
    ),
    "MDS005": Code(
        "A pointer of Git LFS in place of a file",
        "The repository was cloned without Git LFS: the large files are small texts that stand for them.",
        "In that folder: `git lfs install`, then `git lfs pull`.",
    ),
    "MDS006": Code(
        "A file is missing, not readable, or not the JSON that it should be",
        "A folder was copied in part, a job was killed by hand in the middle of a copy, or the file was edited.",
        "Copy the folder again, or take another checkpoint; `mythos-ds verify FOLDER` says what else is wrong.",
    ),
    "MDS008": Code("Another rank failed and says why (never printed)"),
    "MDS009": Code("An error that one rank alone met"),
    "MDS100": Code("Another error of the configuration or of an argument"),
    "MDS101": Code(
        "An unknown key",
        "A setting is misspelt, or stands in the wrong section.",
        "Take the name that the message proposes; `docs/config.md` lists all of them, and "
        '`ds_configs/schema.json` completes them in an editor (`"$schema": "schema.json"`).',
    ),
    "MDS102": Code(
        "A setting that has no default is missing",
        "A file leaves out a key that every run needs, such as `training.seq_len`.",
        "Add it; the message says what it takes. A preset (`ds_configs/`) is a good file to begin with.",
    ),
    "MDS103": Code(
        "A value of the wrong type, out of bounds, or none of the words that are allowed",
        'Often a number in quotes ("8"), a word in another spelling, or a value below the smallest that makes sense.',
        "Take a value that the message allows; it names the nearest one.",
    ),
    "MDS104": Code(
        "No such file and no such preset",
        "`--config` names neither a file, seen from the working folder, nor a preset.",
        "Check the path; the message lists the presets. Presets need no path and no ending: `--config tiny`.",
    ),
    "MDS105": Code(
        "Not valid JSON, or no object of sections",
        "A comma too many or too few, single quotes, NaN, or comments of another kind than keys that begin with _.",
        'Mend the line that the message shows. Comments are keys: `"_note": "..."`.',
    ),
    "MDS106": Code("The configuration's file is not readable, or not UTF-8 text"),
    "MDS107": Code("A key is given twice in one object"),
    "MDS108": Code("A value that no setting can hold: too deep, too many digits, a null character"),
    "MDS109": Code(
        "An override of the wrong form",
        "An argument after the options is not `section.key=value`, or goes into a value as if it were a section.",
        "Write it as `training.lr=0.001`, without spaces around = and without -- before it. In a shell, put "
        "lists and texts with special characters in single quotes.",
    ),
    "MDS110": Code(
        "A secret in a configuration",
        "A key or a value looks like a password or a token, and a configuration is copied into checkpoints.",
        "Remove it, and revoke it if the file was shared; give it in the environment variable that the message names.",
    ),
    "MDS111": Code("An override of a setting that a training stage sets itself"),
    "MDS120": Code(
        "An option of the command line is not allowed as given",
        "A value is out of bounds, an option is missing, or two options do not go together.",
        "The message says what is allowed; `mythos-ds VERB --help` lists the options.",
    ),
    "MDS130": Code("stages is not a list of objects"),
    "MDS131": Code("The name of a training stage is missing, not a word, or taken"),
    "MDS132": Code("A training stage sets what only the whole file can"),
    "MDS133": Code("A training stage after the first gives no length of its own"),
    "MDS134": Code("max_loops changes between stages of a model with a LoRA row for each loop"),
    "MDS135": Code("No training stage of that name or number"),
    "MDS136": Code("The training stages of the file do not continue those that the run has trained"),
    "MDS140": Code(
        "A setting of the model contradicts the weights that training starts from",
        "`training.init_from` names a model, and the file's own model section says something else.",
        "Remove the model section: it is then taken from the weights. Few settings may differ; `mythos-ds "
        "init-config` writes a file that fits.",
    ),
    "MDS141": Code(
        "training.init_from does not name weights that can be read",
        "The path is wrong on this machine, or the folder is no model, checkpoint, run or supported dense model.",
        "Give the folder that holds `config.json` and the weights, a run, or a checkpoint of one.",
    ),
    "MDS150": Code(
        "A key of the deepspeed section that is written elsewhere",
        "DeepSpeed's own name was given for what another section says once for the whole stack.",
        "Remove it and set the key that the message names.",
    ),
    "MDS151": Code("A key of DeepSpeed that does not work in this stack"),
    "MDS152": Code("A key that DeepSpeed has removed"),
    "MDS153": Code("A key that DeepSpeed does not know, and would ignore"),
    "MDS154": Code("A value that DeepSpeed would not take"),
    "MDS155": Code("A logger of DeepSpeed that cannot be used, or whose package is not installed"),
    "MDS156": Code("Scaling of gradients that DeepSpeed refuses with reduce_scatter"),
    "MDS157": Code("Sums of gradients, which DeepSpeed refuses with ZeRO-3"),
    "MDS158": Code("Buffers or reductions that DeepSpeed refuses with experts"),
    "MDS159": Code("A key of ZeRO-3's gathering, without effect in a pipeline"),
    "MDS160": Code("DeepSpeed does not start with the deepspeed section"),
    "MDS161": Code("training.frozen names no parameter, all of them, or what cannot be frozen in this layout"),
    "MDS162": Code(
        "The run does not fit the memory of this machine",
        "The order of the samples, the weights or one micro-batch alone take more than there is.",
        "Give the smaller value that the message asks for, or rehearse the structure with `--proxy`.",
    ),
    "MDS170": Code("A dense model that cannot be cut into prelude, loop and coda"),
    "MDS171": Code("Options of a cut that do not fit the dense model"),
    "MDS172": Code("OpenMythos cannot express the model, or its configuration is missing or damaged"),
    "MDS201": Code("pp_size is no divisor of recurrent_layers, and no three numbers of processes"),
    "MDS202": Code('halting "gate" is trained afterwards, not with the model'),
    "MDS203": Code("Halting in a pipeline"),
    "MDS204": Code("A pipeline with another zero_stage than 3"),
    "MDS205": Code("A pipeline with Muon"),
    "MDS206": Code("A pipeline with offloaded parameters"),
    "MDS207": Code('A width that attn_type "mla" needs is missing'),
    "MDS208": Code('A setting of attn_type "gqa", without effect with "mla"'),
    "MDS209": Code('A setting of attn_type "mla", without effect with "gqa"'),
    "MDS210": Code('qk_norm with attn_type "mla"'),
    "MDS211": Code("qk_norm_span without qk_norm"),
    "MDS212": Code("Keys of rope_scaling that do not go together"),
    "MDS213": Code("no_rope_layers are not rising numbers of layers"),
    "MDS214": Code("n_kv_heads does not divide n_heads"),
    "MDS215": Code("head_dim is odd, or dim is no multiple of n_heads"),
    "MDS216": Code("qk_rope_head_dim is odd"),
    "MDS217": Code("n_experts_per_tok is above the experts that a token can reach"),
    "MDS218": Code("n_expert_groups is missing, or does not divide n_experts"),
    "MDS219": Code("n_limited_groups is missing, or above n_expert_groups"),
    "MDS220": Code("shared_expert_dim without shared experts"),
    "MDS221": Code("mean_recurrence is above max_loops"),
    "MDS222": Code(
        "max_loops is a depth that training would hardly ever draw",
        "With this `mean_recurrence` and `depth_distribution`, fewer than one step in a hundred loops more "
        "often than `max_loops / 2` times.",
        "Lower `max_loops` to the value that the message names, or raise `mean_recurrence`.",
    ),
    "MDS223": Code('discretisation "direct" with injection "pre"'),
    "MDS224": Code("dim is odd, with a loop embedding in pairs"),
    "MDS225": Code("A model of more parameters than torch can address"),
    "MDS226": Code("lora_target without LoRA"),
    "MDS227": Code("act_threshold without halting"),
    "MDS228": Code(
        "Not exactly one of max_steps and max_tokens",
        "The length of the run is missing, or given twice.",
        "Give one of the two. On the command line, `training.max_steps=...` replaces the max_tokens of the file.",
    ),
    "MDS229": Code(
        "micro_batch_size does not divide global_batch_size",
        "The sequences of a step cannot be cut into whole micro-batches.",
        "Take the nearest divisor that the message names.",
    ),
    "MDS230": Code("The batch ramp does not reach global_batch_size in whole increments"),
    "MDS231": Code('decay_fraction without schedule "wsd"'),
    "MDS232": Code('min_lr_ratio with schedule "constant"'),
    "MDS233": Code('Settings of Adam with optimizer "sgd"'),
    "MDS234": Code("Settings of Muon with another optimizer"),
    "MDS235": Code("Muon without muon_lr"),
    "MDS236": Code("Muon with clipped gradients"),
    "MDS237": Code("Muon with ZeRO 0, with offloading, or with too many experts"),
    "MDS238": Code("depth_sigma with another depth_distribution"),
    "MDS239": Code("A depth per sequence where it has no effect, or in a pipeline"),
    "MDS240": Code("depth_curriculum_steps with mean_recurrence 1"),
    "MDS241": Code('ponder_cost without halting "act"'),
    "MDS242": Code("mean_backprop_depth is above max_loops"),
    "MDS243": Code(
        "ep_size does not divide n_experts",
        "Each rank of an expert group holds the same number of experts.",
        'Take the divisor that the message names, or "auto".',
    ),
    "MDS244": Code("Expert groups would hold parts of nodes"),
    "MDS245": Code("ZeRO 0 with experts over several ranks"),
    "MDS246": Code("Offloaded parameters without ZeRO-3"),
    "MDS247": Code("An offloaded optimizer with ZeRO 0"),
    "MDS248": Code(
        "Not exactly one of data.corpus and data.datasets",
        "The run does not know what text to train on, or knows two.",
        'Give `data.datasets` with the prefixes that `mythos-ds prepare-data` wrote, or `data.corpus` "builtin".',
    ),
    "MDS249": Code("data.datasets is empty, or lists a dataset twice"),
    "MDS250": Code("data.split has a negative share, or none for training"),
    "MDS251": Code("data.validation is empty, lists a dataset twice, or one that is trained on"),
    "MDS252": Code("data.datasets without data.tokenizer"),
    "MDS253": Code("data.tokenizer with the built-in corpus"),
    "MDS254": Code("data.loss_mask with the built-in corpus"),
    "MDS255": Code("vocab_size is below the pieces of the built-in corpus"),
    "MDS260": Code("More processes than any machine has"),
    "MDS261": Code(
        "warmup_steps is not below the length of the run",
        "The run was shortened, often by an override of `training.max_steps`, and its warm-up was not.",
        "Shorten `training.warmup_steps` as well.",
    ),
    "MDS262": Code("depth_curriculum_steps is above the length of the run"),
    "MDS263": Code(
        "global_batch_size is no multiple of micro_batch_size times the processes",
        "The number of processes has changed, or the batch was chosen for another one.",
        "Take the nearest size that the message names, or lower `training.micro_batch_size`.",
    ),
    "MDS264": Code("A size of the batch ramp is no multiple of micro_batch_size times the processes"),
    "MDS265": Code(
        "ep_size does not divide the number of processes",
        "Expert groups are made of whole groups of ranks, and this number of processes leaves some over.",
        'Take the divisor that the message names, or "auto".',
    ),
    "MDS266": Code("The stages of the pipeline do not share the processes out"),
    "MDS267": Code("ep_size does not divide the processes of a pipeline stage"),
    "MDS268": Code("A micro-batch does not give each process of a pipeline stage whole rows"),
    "MDS269": Code("Too few micro-batches for the pipeline, or no whole rounds of them"),
    "MDS270": Code("A size of the batch ramp does not fit the pipeline"),
    "MDS271": Code("Pipeline stages would hold parts of nodes"),
    "MDS280": Code("grad_dtype bfloat16 with fp32 weights, or in a pipeline"),
    "MDS281": Code("A dispatcher that has no effect in this layout, or cannot run here"),
    "MDS282": Code("overlap where no row travels, or with micro-batches that have no two halves"),
    "MDS283": Code("dispatch_dtype fp8 where no row travels"),
    "MDS400": Code("Another error of data or of a tokenizer"),
    "MDS401": Code("A sample that is read is not what was prepared"),
    "MDS402": Code("A chat template is at fault for every conversation"),
    "MDS410": Code(
        "The built-in corpus is not there",
        '`data.corpus` is "builtin", and the corpus has not been made in `data.data_dir`.',
        "Run the command of the message (make quickstart does it as well).",
    ),
    "MDS411": Code(
        "No prepared dataset at that prefix",
        "The path is wrong on this machine, is a folder, or has an ending: a prefix has none.",
        "Give what prepare-data was given as `--output`, such as `data/docs` for `data/docs.bin` and `data/docs.idx`.",
    ),
    "MDS412": Code(
        "Data were prepared with another tokenizer",
        "`data.tokenizer` is not the file that the dataset was made with; its ids would mean other words.",
        "Give that tokenizer, or prepare the data again with this one; the message has the command.",
    ),
    "MDS413": Code(
        "vocab_size is below the ids of the data",
        "The model's embedding has fewer rows than the tokenizer has pieces.",
        "Set `model.vocab_size` to the number that the message names, or to the next multiple of 64 or 128 above it.",
    ),
    "MDS414": Code(
        "The index of a run's samples is damaged",
        "It was copied in part, a disk was full, or a file of it was changed.",
        "Remove the folder that the message names; the next start makes it anew.",
    ),
    "MDS415": Code(
        "A node does not see the index of the samples",
        "`data.data_dir` is on a disk of one node, and the others have a folder of that name of their own.",
        "Put `data.data_dir` on a file system that all nodes share.",
    ),
    "MDS416": Code("data.loss_mask contradicts the datasets"),
    "MDS417": Code(
        "data.split leaves a part without text",
        "A dataset has few documents, and a share of the split is rounded to none, or to too little.",
        "Give that part a larger share, 0, or text of its own (`data.validation`).",
    ),
    "MDS418": Code("There is no held-out text, or too little of it"),
    "MDS419": Code(
        "Files of prepared data are damaged or do not belong together",
        "A copy is incomplete, or one of the files is of another run of prepare-data.",
        "`mythos-ds verify PREFIX --full` names the place; copy all files again, or prepare the data again.",
    ),
    "MDS420": Code(
        "An input of prepare-data is missing, or of no known kind",
        "The path is wrong, the folder holds no file with a known ending, or the ending says nothing.",
        "Check the path; give `--format` for another ending. `docs/data.md` lists the kinds.",
    ),
    "MDS422": Code(
        "The column with the text is not there",
        "The text stands under another name than the default.",
        "Give `--key` with one of the names that the message lists.",
    ),
    "MDS423": Code(
        "Rows that hold no text or no conversation",
        "Some lines are empty, of another shape, or cut off.",
        "Mend them (the message has file and line), or leave them out with `--on-bad-row skip`.",
    ),
    "MDS424": Code(
        "Text that is not UTF-8",
        "The files were saved in another encoding.",
        "Give it as `--encoding`, such as latin-1 or utf-16, or convert the files with iconv.",
    ),
    "MDS425": Code("An input file is damaged, or not what its ending says"),
    "MDS426": Code(
        "A process that reads or encodes data was killed",
        "The machine ran out of memory, and the system ended the largest process.",
        "Lower `data.num_workers`, or `--workers` of prepare-data: the same command goes on from its finished parts.",
    ),
    "MDS427": Code("The inputs hold no text and no conversation"),
    "MDS430": Code(
        "The tokenizer is not there",
        "`data.tokenizer`, or `--tokenizer`, names no file, seen from the working folder.",
        "Check the path, or make one with the command of the message.",
    ),
    "MDS431": Code("A file that is no tokenizer, or whose parts contradict each other"),
    "MDS432": Code(
        "The tokenizer has no token that ends a document",
        "Documents are packed behind each other, and nothing would keep them apart.",
        "Write the file that the message shows, with a special token of the tokenizer.",
    ),
    "MDS434": Code("The tokenizer has no chat template"),
    "MDS435": Code("A chat template that does not fit the conversations, or marks no answers"),
    "MDS500": Code("Another error of a checkpoint or of weights"),
    "MDS501": Code(
        "--resume names no checkpoint and no run",
        "The path is wrong on this machine, or a checkpoint was renamed.",
        "Give the run's folder (its newest complete checkpoint is taken) or a folder step_N of its checkpoints.",
    ),
    "MDS502": Code(
        "No complete checkpoint",
        "The run was ended before its first save, or every checkpoint is damaged; the warnings above say which.",
        "Copy the run again if it was copied; else start again with a new `--run-dir`.",
    ),
    "MDS503": Code("A model in place of a training checkpoint"),
    "MDS504": Code(
        "The run was started with other settings",
        "The file, or an override, has changed what a run cannot change on its way.",
        "Undo the change, give a new `--run-dir`, or train on in a new training stage; the message shows how.",
    ),
    "MDS505": Code(
        "The run directory holds another history",
        "`--resume never`, or an earlier checkpoint, was given for a folder that already has checkpoints.",
        "Give a new `--run-dir`, or remove the old folder.",
    ),
    "MDS506": Code("A run's manifest was changed by hand, or is damaged"),
    "MDS507": Code(
        "Files of a checkpoint or of weights are damaged, or do not belong together",
        "A copy is incomplete, a disk has failed, or a file was replaced.",
        "`mythos-ds verify FOLDER` names each file; copy it again, or go on from an earlier checkpoint.",
    ),
    "MDS508": Code(
        "A file would execute code when it is read",
        "A pickled file holds more than tensors and plain values; nothing was executed.",
        "Ask for safetensors. Only if you trust whoever made the file: `--allow-pickle`.",
    ),
    "MDS509": Code("A file that torch.save did not write, or that is damaged"),
    "MDS510": Code(
        "The tensors are not those of the model",
        "The configuration beside the weights is of another model, or tensors were left out or renamed.",
        "Check that `config.json` and the weights come from the same place; the message names the first tensor.",
    ),
    "MDS511": Code(
        "Some files of the weights are missing, or the index names others",
        "A download or a copy of a model in several files is incomplete.",
        "Download the folder again; there must be one set of files, and the index that belongs to it.",
    ),
    "MDS512": Code(
        "A checkpoint could not be saved",
        "Mostly a full disk, or a file system that went away; the checkpoints before it are intact.",
        "Make room and start the same command again; `mythos-ds plan` says how large a checkpoint is.",
    ),
    "MDS513": Code(
        "No such model, run or checkpoint",
        "The path is wrong, or it is a name of the Hugging Face hub: nothing is downloaded on the way.",
        "Check the path, or run the `hf download` command that the message shows for a name of the hub.",
    ),
    "MDS514": Code("An adapter in place of a model"),
    "MDS515": Code("Weights that hold NaN or infinite values"),
    "MDS516": Code("Weights in files, or of a kind, that are not read here"),
    "MDS517": Code("Models that do not belong to one training, which have no average"),
    "MDS518": Code("A folder that is no model of this version's format"),
    "MDS600": Code("Another error of something that is written"),
    "MDS601": Code(
        "The output exists",
        "A file or folder of that name is there, and nothing is overwritten unasked.",
        "Give another `--output`, remove the old one, or give `--overwrite` where the command has it.",
    ),
    "MDS602": Code(
        "An output cannot be written",
        "A full disk, a quota, no permission, or a path through a file.",
        "Check the free space and the owner of the folder; what was there before is unchanged.",
    ),
    "MDS603": Code(
        "Another job is writing there",
        "Two jobs were given the same output, or one that was thought dead still runs.",
        "Wait for it or end it, or give another output. If it ran on another machine that is gone: `--break-lock`.",
    ),
    "MDS604": Code("A lock that cannot be read"),
    "MDS700": Code("Another error of the layout of processes"),
    "MDS701": Code(
        "Several nodes, and no address of rank 0",
        "`MASTER_ADDR` did not reach the processes.",
        "Set it to the host of rank 0; with mpirun: `-x MASTER_ADDR=HOST`. `mythos-ds render-launch` writes job files.",
    ),
    "MDS702": Code("Variables of the launcher that contradict each other, or are missing"),
    "MDS703": Code("MASTER_PORT is no port"),
    "MDS704": Code(
        "Rank 0 is not reached",
        "Its process has not started or has ended, its name is unknown on this node, or a firewall is between them.",
        "Look for the first error in the log of rank 0; then `mythos-ds preflight`, which tests names, ports "
        "and links.",
    ),
    "MDS705": Code(
        "Another program has the port of rank 0",
        "Two runs share a node, or one that was ended has left a process behind.",
        "End what is left over, or choose another `MASTER_PORT` (deepspeed: `--master_port`).",
    ),
    "MDS706": Code(
        "Some processes did not arrive",
        "A node failed to start, or its processes ended before the meeting; the message names the ranks.",
        "Read the logs of those ranks; `mythos-ds preflight` tests every node.",
    ),
    "MDS707": Code(
        "More processes on a node than GPUs",
        "The launcher starts more processes than the node shows, `CUDA_VISIBLE_DEVICES` hides some, or all processes "
        "are shown the same one.",
        "One process for each GPU: `--num_gpus`, or `slots=N` in the hostfile. A launcher may show each process one "
        "GPU (Slurm's `--gpus-per-task`), if it shows each another.",
    ),
    "MDS708": Code("No process group within the time limit"),
    "MDS709": Code("An interactive shell of Slurm that looks like a task of many"),
    "MDS710": Code("A hostfile with a line of another form, or a host given twice"),
    "MDS711": Code("A version of torch or DeepSpeed that the pipeline was not made for"),
    "MDS720": Code(
        "A DeepSpeed whose order of weight gathers is not known",
        "Another version of DeepSpeed, or a changed one; with experts on several ranks and ZeRO-3 its gathers must be "
        "put into one order, or ranks may wait for each other for ever.",
        "Install the version that the message names, or train with `parallel.zero_stage: 2` or `parallel.ep_size: 1`.",
    ),
    "MDS721": Code(
        "Ranks made their weights in different orders",
        "A function that changes the model (`adapt`) does not do the same on every rank.",
        "Let it depend on the configuration only, not on the rank.",
    ),
    "MDS730": Code(
        "A torch that cannot add gradients up in fp32",
        "Weights are bf16, their gradients fp32 (`training.grad_dtype`), and this torch is too old for it.",
        'Install a newer torch; or set `training.grad_dtype` "bfloat16", where sums over many loops lose digits.',
    ),
    "MDS731": Code(
        "No CUDA compiler for an optimizer that is offloaded",
        'With `parallel.offload_optimizer` "cpu" on a GPU, DeepSpeed compiles its CPU Adam, and finds no nvcc.',
        "Install the CUDA toolkit of torch's version (`python -c 'import torch; print(torch.version.cuda)'`) and set "
        "`CUDA_HOME` to its folder on every node; `mythos-ds preflight` looks for it. Or do not offload.",
    ),
    "MDS760": Code("A package that a measurement compares with is missing; those of requirements.lock are needed"),
    "MDS761": Code("What a measurement compares does not compute the same numbers"),
    "MDS770": Code("`training.eval_deep_every` without periodic evaluations"),
    "MDS780": Code(
        "The package is not installed",
        "The folder of a checkout was imported as it lies there, without its commands.",
        "In the checkout: `pip install -e .`, or activate the environment that `make setup` has made.",
    ),
    "MDS800": Code("Another number that is not finite"),
    "MDS801": Code(
        "The loss is not finite",
        "Training has diverged: a learning rate that is too high or a warm-up that is too short; more rarely bad data.",
        "Resume from the checkpoint before with a lower `training.lr` or a longer `training.warmup_steps`; "
        "watch the gradient norm in the steps before.",
    ),
    "MDS802": Code(
        "The gradient norm is not finite",
        "As MDS801, met in the backward pass.",
        "As MDS801.",
    ),
    "MDS900": Code("Another error of a study, or too little to draw a conclusion from"),
    "MDS901": Code("A process of a study or of a measurement failed; the message has the end of its log"),
    "MDS902": Code("The model that the SmolLM study starts from is not there"),
}
"""By code."""

_INTRODUCTION = """# Troubleshooting

Generated by `tools/config_schema.py` from `mythos_ds/error_codes.py`.

Each error ends with a code in brackets, at the end of its first line; where several things are wrong with a
configuration, each line has its own:

```text
error: override: model.n_expert: unknown key; did you mean 'n_experts'? [MDS101]
```

Search this page for the code. A code keeps its meaning from version to version. Exit code 2 means that the message says
what to mend, 1 a fault of this program ([MDS001](#mds001)). In Python, `error.code` is the code, and
`error.problems` has every problem, each with a `code`; `error.report()` is what the command prints.

## Causes and cures

The commonest errors.
"""
_ALL = """
## All codes

The first digit is the subject. A class of errors has the code that ends in 00 for what has no code of its own.
"""


def troubleshooting_page() -> str:
    """docs/troubleshooting.md."""
    parts = [_INTRODUCTION]
    for code, (title, cause, cure) in CODES.items():
        if cure:
            cause_text, cure_text = (_wrapped(f"{name}: {text}") for name, text in (("Cause", cause), ("Cure", cure)))
            parts.append(f"\n### {code}\n\n**{title}.**\n\n* {cause_text}\n* {cure_text}\n")
    parts.append(_ALL)
    for digit, subject in SUBJECTS.items():
        parts.append(f"\n### {subject}\n\n| code | |\n|---|---|\n")
        for code, about in CODES.items():
            if code[3] == digit:
                parts.append(f"| {f'[{code}](#{code.lower()})' if about.cure else code} | {about.title} |\n")
    return "".join(parts)


def _wrapped(text: str) -> str:
    return fill(text, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
