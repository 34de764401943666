"""Write docs/job_file.md from the job's models, so that every field and default there is true."""

import sys
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from distplat.cli.render import field_rows
from distplat.platform import evaluations, lr_schedules, model_options, optimizers, spec, trackers

HEAD = """\
# The job file

Every field, with its default. This page is written by `python docs/job_file.py`; a test holds that
it is up to date. YAML, read strictly: an unknown or doubled key is an error, `1e-3` is a number,
`010` is ten, tags are refused.

What is set where, strongest first: `--strategy`, `--num-workers`, `--name`; `--set a.b=c`;
environment variables `DISTPLAT_A__B=c`; the job file; defaults.

A remote job (`--address http://...`) keeps its run directory below `~/distplat/<storage_path>` of
the machine where its driver runs, `~/distplat/runs` where that is a URL: the job's own folder ends
with the job. What a URL does: [checkpoints](checkpoints.md#a-copy-at-a-url).

## What goes to a cluster

The folder of the job file, or `--working-dir`, and distplat itself; to a cluster of one node only
where it is reached by its job API (`http://...`). Ray takes 100 MiB of it by that API, and 512 MiB
by `--address HOST:6379`; as much of each of the `py_modules` of a runtime environment, which may be
wheels, too. A run that begins on a cluster
of one node stays on that machine, also where others join later, unless its runtime environment has
packages or variables of its own. `submit`
says how many files and bytes. Left out are what `.gitignore` and `.rayignore` name, `.git`,
`.venv`, `runs` and files whose names, in upper or lower case, are known to hold secrets (`.env*`,
`*.env`, `.netrc*`, `.aws`, `.config`, `.ssh`, `*.pem`, `id_rsa*`, `token`, `credentials.json*`,
...; the list is `SECRETS` in `cli/package.py`); `submit` names the latter. It ships one all the
same with `--runtime-env-json '{"excludes": ["!token.json"]}'`; these are lines as of a
`.gitignore`, of which the last one that matches counts. Two things are refused: a link to
such a file, and a file of at most 64 KiB in which a private key is recognized, in PEM (indented or
in a JSON string, too) or in PuTTY's format. List them in `.rayignore`. Templates (`.env.example`,
`terraform.tfvars.sample`, ...; `HARMLESS` there) are shipped. A home directory, and a folder with
which files of the home directory would be shipped, is refused unless `--working-dir` names it. Ray
keeps the package where every user of the cluster can read it. A file that the task imports and that
would be left out is named before the upload. Directories and files that a runtime environment names
as `py_modules` are counted, searched and refused in the same way. One with the home directory in it
needs that in its `.rayignore`, and the home directory itself is always refused.

The cluster's own Python has to have what distplat imports. What it lacks is named, with its path
(exit code 3); `--runtime-env-json '{"pip": ["typer"]}'` brings a package along.

Put no key or password into `task_args` or the `env_vars` of a runtime environment: they stand in
`job.yaml` of the run directory, and everybody who reaches the cluster's dashboard reads them (the
report's page and trackers show `***` for what looks like one). Let
the task read a key from a file, or from a variable, of the machines on which workers run.
"""

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("Top level", "", spec.Job),
    ("scaling", "scaling.", spec.Scaling),
    ("lr_schedule", "lr_schedule.", lr_schedules.Schedule),
    ("embeddings", "embeddings.", model_options.Embeddings),
    ("initial_weights", "initial_weights.", model_options.InitialWeights),
    ("data", "data.", spec.Data),
    ("compile", "compile.", model_options.Compile),
    ("ema", "ema.", model_options.EMA),
    ("evaluation", "evaluation.", spec.Evaluation),
    ("checkpoint", "checkpoint.", spec.CheckpointConfig),
    ("checkpoint.keep_best", "checkpoint.keep_best.", evaluations.KeepBest),
    ("early_stop", "early_stop.", evaluations.EarlyStop),
    ("failure", "failure.", spec.Failure),
    ("trackers", "trackers.N.", trackers.TrackerSpec),
]

BESIDE = ("name", "warmup_steps")
SCHEDULERS = """
## lr_schedule, by torch

A class of `torch.optim.lr_scheduler` with its arguments and torch's defaults; it is stepped once
after each step. `warmup_steps` may stand beside most: the scheduler begins when the warm-up is
over. [`ReduceLROnPlateau`](#reducelronplateau) is stepped after evaluations instead.

```yaml
lr_schedule: {name: CosineAnnealingLR, T_max: 1000, eta_min: 1e-5, warmup_steps: 100}
lr_schedule: {name: OneCycleLR, max_lr: 0.1, cycle_momentum: false}     # over all steps of the run
lr_schedule: {name: wsd, warmup_steps: 100, decay_steps: 200, decay: sqrt}     # a shape from above
lr_schedule: {name: ReduceLROnPlateau, factor: 0.5, patience: 3}     # of the evaluations' loss
```

`OneCycleLR` is over the run after the warm-up: `total_steps` may be left out, and must be the
run's, less `warmup_steps`, where it is given. Its `max_lr`, and `base_lr` and `max_lr` of
`CyclicLR`, are one number for all, in place of each `lr` of optimizer, groups and
`embeddings.optimizer`, as in torch; without `max_lr` each `lr` is that of its group. Both leave
momentum alone: `cycle_momentum: false` must stand there, for torch's default is true. `CyclicLR`
has no warm-up beside it.

`SequentialLR` has one scheduler after the other, each from the beginning at its milestone:

```yaml
lr_schedule:
  name: SequentialLR
  schedulers:
    - {name: LinearLR, start_factor: 0.01, total_iters: 100}
    - {name: CosineAnnealingLR, T_max: 900}
  milestones: [100]
```

Not among them are those with rates of their own: `OneCycleLR`, `CyclicLR`. Not here at all:
`ChainedScheduler`. A function of the step, as for `LambdaLR` and `scale_fn` of `CyclicLR`, is
`lr(step, total)` of the [task](task.md#the-learning-rate), and stands in place of `lr_schedule`.

| name | arguments |
|---|---|
"""
PLATEAU = """
### ReduceLROnPlateau

The job's `evaluation` says when it is stepped: every so many epochs or steps, the next step already
has the new rate. `metric` is the figure that it goes by, of all workers together: `loss`, unless it
says another name that the task's `metrics()` gives; `mode: max` where larger is better. The rates
are those of a plain loop with torch's class, to the bit. Each group's `lr` falls by itself, and so
does that of `embeddings.optimizer`; `min_lr` is one number for all.

- An evaluation counts once, also where it is made again after a failure. One that is there only
  because the run ends does not count: a longer run would not have it. That of
  `evaluation.before_first` does not either: a loop steps the scheduler after training.
- What it has seen is in checkpoints. A run that goes on from one with another `metric` or `mode`
  keeps the rate, and begins to look for the best figure anew.
- Under `ring`, `hybrid` and `ps-sync`, whose servers are told with each push. Refused by name:
  under `ps-async`, where workers train on while one evaluates, so that no step is the first with
  the new rate; with `backup_workers`, which evaluate different parameters; where nothing is
  evaluated before the run's end.
- With `warmup_steps` it begins when they are over: evaluations after that many steps or fewer do
  not count, as in timm. `SequentialLR` does not take it in, nor does torch's own.
- `distplat verify` makes runs without evaluations, in which no rate is reduced.
"""
STRATEGY = """
## strategy

A name, or a mapping of `name` and the strategy's own options:

```yaml
strategy: ring
strategy: {name: ps-sync, num_servers: 2}
```

`distplat strategies` lists them all with their options.

## optimizer

`name` and the arguments of that class in `torch.optim`, with torch's defaults; `lr` must be given.
`{name: task}`: the one that `optimizer(named_parameters)` of the [task](task.md#the-optimizer)
makes, under `ring`. `LAMB` is not one of torch's; it is Algorithm 2 of
[the paper](https://arxiv.org/abs/1904.00962).

`Adafactor`, `Muon` and `LAMB` look at a parameter as a whole, the others at each element. For them,
and where groups name several, shards end where parameters do, and may be uneven; they are refused
under `tensor` of `hybrid` and with `split: load`. `Muon` takes matrices alone: the rest is put into
[groups](#optimizergroups) with a `name` of their own.
"""
GROUPS = """
## optimizer.groups

Parameters with arguments of their own, as in param groups of torch:

```yaml
optimizer:
  name: AdamW
  lr: 1e-3
  weight_decay: 0.1
  groups:
    - {match: "*.bias,*norm*", weight_decay: 0}
    - {match: "head.*", lr: 1e-4}
```

`match` has patterns of names, separated by commas: `*`, `?` and `[...]` as in a shell. Names are
those of `model.named_parameters()`; those of parameters that the task keeps itself begin with
`task:`. A parameter belongs to the first group that matches it. One that no group matches has the
optimizer's arguments, and so has a group for what it does not give.

A group takes every argument of its optimizer but `initial_accumulator_value`, which torch ignores
in a group, and of `Adafactor` `beta2_decay`, `eps` and `d`. `amsgrad`, `centered` and whether
`momentum` is 0 are the same in all groups.

A group may have an optimizer of its own by `name`. It has nothing of the other's arguments, so `lr`
must be given. As Muon is used, for the matrices of hidden layers:

```yaml
optimizer:
  name: Muon
  lr: 0.02
  groups:
    - {match: "*.bias,*norm*,embed*,head*", name: AdamW, lr: 3e-4}
```

Or the other way round: `name: AdamW`, and groups `{match: "*.bias,*norm*"}`, which stays AdamW's,
and `{match: "blocks.*", name: Muon, lr: 0.02}`. Update and state are those of torch's classes side
by side. A trained parameter that is no matrix and would be Muon's is refused by name before the
first step. A frozen one is not, and then cannot be unfrozen. The table of an embedding is a matrix,
which Muon's authors leave to AdamW: a warning names it.

`lr_schedule` applies to the rate of each group, `clip_norm` to all parameters. A pattern that
matches no parameter, or only those of earlier groups, ends the run before its first step. Embedding
tables are updated as `embeddings.optimizer` says: a group that matches one is refused. Groups may
change where a run goes on from a checkpoint; where one has a `name`, only their arguments may.

Where neighbours in the model are in different groups, the update is more operations:
[flat vectors](decisions/flat_vectors.md).
"""
ROWS = """
## embeddings.optimizer

`name` and its arguments; a step updates the rows that it uses and leaves the others as they are
([embeddings.md](embeddings.md)).
"""


def page() -> str:
    """Give the whole page."""
    parts = [HEAD]
    mappings = {"strategy", "optimizer", *(title for title, _, _ in SECTIONS)}
    mappings |= {"embeddings.optimizer"}
    for title, prefix, model in SECTIONS:
        parts.append(f"\n## {title}\n\n| field | type | default | |\n|---|---|---|---|\n")
        for row in field_rows(model):
            cells = [row["type"], f"`{row['default']}`", row["description"]]
            if prefix + row["name"] in mappings:
                default = "`required`" if row["default"] == "required" else ""
                form = "list" if row["name"] == "trackers" else "mapping"
                cells = [form, default, "see below"]
            parts.append("| " + " | ".join([f"`{prefix}{row['name']}`", *cells]) + " |\n")
    parts.append(SCHEDULERS)
    for schedule in lr_schedules.LRSchedule.__subclasses__():
        if schedule is not lr_schedules.Schedule:
            known = [name for name in schedule.model_fields if name not in BESIDE]
            names = ", ".join(f"`{name}`" for name in known)
            parts.append(f"| {schedule.__name__} | {names} |\n")
    parts.append(PLATEAU)
    parts.append(STRATEGY + "\n| name | arguments |\n|---|---|\n")
    for kind in optimizers.OPTIMIZERS:
        if kind is optimizers.TaskOptimizer:
            continue
        known = [name for name in kind.model_fields if name not in ("name", "groups")]
        names = ", ".join(f"`{name}`" for name in known)
        parts.append(f"| {kind.__name__} | {names} |\n")
    parts.append(GROUPS)
    parts.append(ROWS + "\n| name | arguments |\n|---|---|\n")
    for rows in model_options.RowOptimizer.__subclasses__():
        names = ", ".join(f"`{name}`" for name in rows.model_fields if name != "name")
        parts.append(f"| {get_args(rows.model_fields['name'].annotation)[0]} | {names} |\n")
    return "".join(parts)


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".md")
    target.write_text(page())
    sys.stderr.write(f"wrote {target}\n")
