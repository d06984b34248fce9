"""The tables and plots of docs/quality.md, from ``results/*.json``.

python -m benchmarks.make_tables
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.fine_tuning import METHODS as FINE_TUNED
from benchmarks.pages import DOCS, write_tables
from benchmarks.summary import RESULTS

PAGE = DOCS / "quality.md"
Rows = dict[str, dict[str, Any]]


def main() -> None:
    write_tables(PAGE, tables())
    for name, title in {
        "sparse_lm": "Language model, two sparse tables of 109,213 words",
        "tied_transformer": "Transformer, tied table of 20,001 words",
    }.items():
        plot(_stored(name)["methods"], title, DOCS / "img" / f"quality_{name}.png")


def tables() -> dict[str, str]:
    """All of the page, by the name of their marks, but those of `usual_recipe_tables` and `frontier`."""
    sparse, tied, lstm = (_stored(name) for name in ("sparse_lm", "tied_transformer", "lstm_lm"))
    usual = _stored("usual_recipe")["runs"]
    return {
        "sparse_lm": sparse_table(sparse["methods"]),
        "sparse_lm_targets": targets_table(sparse["methods"]),
        "sparse_lm_untuned": untuned_table(sparse),
        "tied_transformer": tied_table(tied["methods"]),
        "tied_transformer_untuned": untuned_table(tied),
        "step_cost": cost_table(_stored("step_cost")["methods"]),
        "dense_step_cost": dense_cost_table(_stored("dense_step_cost")["methods"]),
        "extreme": extreme_table(_stored("extreme")["methods"]),
        "default_eps": default_eps_table(sparse["methods"], lstm["methods"]),
        "goal": goal_table(),
        "floors": floors_table(sparse["methods"], tied["methods"], usual),
        "fine_tuning": fine_tuning_table(_stored("fine_tuning")["runs"]),
    }


def _stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def sparse_table(rows: Rows) -> str:
    """Every method at its own learning rate and eps; the exact optimizer also at the default eps."""
    exact = rows["adam"]
    lines = [
        "| optimizer of both tables | state | test perplexity (range over 3 seeds) | against exact "
        "| against exact, beta1 = 0 | lr | eps | valid | valid, default eps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    entries = [(row["label"], row, "best") for row in rows.values()]
    entries.insert(1, (exact["label"] + ", default eps", exact, "default_eps"))
    for label, row, at in entries:
        chosen = row[at]
        lines.append(
            f"| {label} | {share(row, exact)} | {perplexity(chosen)} | {against(chosen, exact['best'])} "
            f"| {against(chosen, rows['adam_b0']['best'])} | {chosen['lr']:g} | {chosen['eps']:.0e} "
            f"| {chosen['valid']:.1f} | {row['default_eps']['valid']:.1f} |"
        )
    return "\n".join(lines)


def targets_table(rows: Rows) -> str:
    """The targets set before the runs, and what came out."""
    tuned, default = rows["adam"]["best"], rows["adam"]["default_eps"]
    targets = [
        ("CountSketch 20x no worse than exact, tuned", "cs20", tuned, 1.0),
        ("CountSketch 20x at least 2 % better than exact at the default eps", "cs20", default, 0.98),
        ("RowWise 10x within 1 % of exact, tuned", "rw_10", tuned, 1.01),
        ("RowWise 10x at least 2 % better than exact at the default eps", "rw_10", default, 0.98),
        ("RowWise 100x no worse than exact at the default eps", "rw_100", default, 1.0),
        ("RowWise within 1.5 % of exact at the default eps", "rw", default, 1.015),
    ]
    lines = ["| target | measured, mean (range over seeds) | met |", "|---|---|---|"]
    for text, method, reference, most in targets:
        if method in rows and rows[method]["best"]["test"] and reference["test"]:
            ratios = paired(rows[method]["best"], reference)
            lines.append(f"| {text} | {percent(ratios)} | {'yes' if mean(ratios) <= most else '**no**'} |")
    return "\n".join(lines)


def tied_table(rows: Rows) -> str:
    """Every method at its own learning rate, all of which are shown: a search by factors of two is coarse."""
    lines = [
        "| what is compressed | state | test perplexity (range over 3 seeds) | against exact "
        "| against exact, beta1 = 0 on the table | lr | valid by lr, seed 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        chosen = row["best"]
        columns = [row["label"], share(row, rows["adamw"]), perplexity(chosen)]
        columns += [against(chosen, rows[name]["best"]) if name in rows else "" for name in ("adamw", "adamw_b0")]
        several = len({x["eps"] for x in row["tried"]}) > 1
        tried = {f"{x['lr']:g}" + f", eps {x['eps']:.0e}" * several: x["valid"] for x in row["tried"]}
        columns += [f"{chosen['lr']:g}" + f", eps {chosen['eps']:.0e}" * several]
        columns += [("; " if several else ", ").join(f"{at}: {valid:.1f}" for at, valid in tried.items())]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def extreme_table(rows: Rows) -> str:
    """Every method at its own learning rate: precision and recall in per cent, the mean over seeds and their range."""
    figures = ("P@1", "P@3", "P@5", "R@100")
    lines = [
        f"| optimizer | state | {' | '.join(figures)} | lr | error of the first label by lr, validation, seed 0 |",
        "|---" * (len(figures) + 4) + "|",
    ]
    for row in rows.values():
        chosen = row["best"]
        columns = [row["label"], share(row, rows["sparse_adam"])]
        for figure in figures:
            values = [100 * one[figure] for one in (chosen["test"] or {}).values()]
            columns += [f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"]
        columns += [f"{chosen['lr']:g}", ", ".join(f"{x['lr']:g}: {100 * x['valid']:.1f}" for x in row["tried"])]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def default_eps_table(sparse: Rows, lstm: Rows) -> str:
    """Codecs of sparse tables at torch's default eps and, in brackets, at the best one; always at the best rate.

    Args:
        sparse: of `benchmarks.sparse_lm`.
        lstm: of `benchmarks.lstm_lm`, with its sampled softmax.
    """
    ways = ("b0", "rw", "rw10", "default")
    tasks = {
        "four words of context, SparseAdam": (sparse, ("adam", "adam_b0", "rw", "rw_10", "floored")),
        **{
            f"LSTM, {label}": (lstm, (f"sampled_{name}", *(f"sampled_{name}_{way}" for way in ways)))
            for name, label in (("adam", "SparseAdam"), ("adagrad", "Adagrad"), ("rmsprop", "RMSprop"))
        },
    }
    lines = [
        "| optimizer of the tables | exact | exact, beta1 = 0 | `RowWise()` | `RowWise(compression=10)` "
        "| `Factored(floor=1)` |",
        "|---|---|---|---|---|---|",
    ]
    for task, (rows, names) in tasks.items():
        found = [rows.get(name) for name in names]
        columns = [f"{row['default_eps']['valid']:.1f} ({row['best']['valid']:.1f})" if row else "" for row in found]
        lines.append(f"| {' | '.join([task, *columns])} |")
    return "\n".join(lines)


#: Of `goal_table`: task, the benchmark, its exact optimizer, the states' share of exact ones of the same tables (empty:
#: what was measured), and the methods at about a thousandth and a ten-thousandth.
GOALS = (
    ("two sparse tables, SparseAdam", "sparse_lm", "adam", ("", ""), ("rw_10", "rw_100")),
    ("LSTM, SparseAdam", "lstm_lm", "sampled_adam", ("", ""), ("sampled_adam_rw10", "sampled_adam_rw100")),
    ("LSTM, full softmax, Adam", "lstm_lm", "full_adam", ("", ""), ("full_adam_rw10", "")),
    ("LSTM, Adagrad", "lstm_lm", "sampled_adagrad", ("", ""), ("sampled_adagrad_rw10", "")),
    ("LSTM, RMSprop", "lstm_lm", "sampled_rmsprop", ("", ""), ("sampled_rmsprop_rw10", "")),
    ("tied table, AdamW", "tied_transformer", "adamw", ("1/2,560", "1/25,600"), ("rw10_drop", "rw100_drop")),
    ("extreme classifier", "extreme", "sparse_adam", ("1/1,280", "1/12,800"), ("words_10", "words_100")),
)


def goal_table() -> str:
    """What a thousandth and a ten-thousandth of the tables' states cost, against exact ones at their best setting."""
    lines = ["| task | about 1/1,000 | about 1/10,000 |", "|---|---|---|"]
    for task, source, exact, shares, methods in GOALS:
        rows = _stored(source)["methods"]
        cells = []
        for name, known in zip(methods, shares, strict=True):
            if name not in rows:
                cells.append("")
                continue
            ways = rows[name]["best"], rows[exact]["best"]
            apart = points_apart(*ways) if source == "extreme" else against(*ways)
            cells.append(f"{known or share(rows[name], rows[exact])}: {apart}")
        lines.append(f"| {' | '.join([task, *cells])} |")
    return "\n".join(lines)


def points_apart(chosen: dict[str, Any], exact: dict[str, Any]) -> str:
    """Of P@1 in the extreme classifier: mean and range over seeds."""
    apart = [100 * (chosen["test"][seed]["P@1"] - exact["test"][seed]["P@1"]) for seed in sorted(chosen["test"])]
    return f"{mean(apart):+.1f} points of P@1 ({min(apart):+.1f} to {max(apart):+.1f})"


def floors_table(sparse: Rows, tied: Rows, usual: list[dict[str, Any]]) -> str:
    """Perplexity of the validation blocks with seed 0 by the floor of `Factored`, each at its best setting.

    Args:
        sparse: of `benchmarks.sparse_lm`.
        tied: of `benchmarks.tied_transformer`.
        usual: runs of `benchmarks.usual_recipe`, where all have one learning rate.
    """
    lines = ["| task | no floor | 0.3 | 1, the default | 3 |", "|---|---|---|---|---|"]
    first = [run for run in usual if (run["setting"]["lr"], run["setting"]["seed"]) == (4e-3, 0)]
    by_usual = {run["setting"]["method"]: run["valid"] for run in first}
    names = {
        "two sparse tables": (sparse, ("factored", "floored_less", "floored", "floored_more")),
        "tied table, short recipe": (tied, ("factored_drop", "floored_less", "floored_drop", "floored_more")),
    }
    for task, (rows, methods) in names.items():
        found = [f"{rows[name]['best']['valid']:.1f}" if name in rows else "" for name in methods]
        lines.append(f"| {' | '.join([task, *found])} |")
    methods = ("tied_drop_factored", "tied_drop_less", "tied_drop_floored", "tied_drop_more")
    found = [f"{by_usual[name]:.1f}" if name in by_usual else "" for name in methods]
    lines.append(f"| {' | '.join(['tied table, usual recipe at 4e-3', *found])} |")
    return "\n".join(lines)


def fine_tuning_table(runs: list[dict[str, Any]]) -> str:
    """Every method at the learning rate that is best for it with seed 0, of those tried; of held-out articles."""
    lines = [
        "| optimizer | loss, nats a token | perplexity against AdamW | state, MiB | peak of the process, MiB | lr "
        "| loss by lr, seed 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    exact: dict[int, float] = {}  # by seed
    for name, method in FINE_TUNED.items():
        finished = [run for run in runs if run["setting"]["method"] == name and run["valid"] is not None]
        tried = {run["setting"]["lr"]: run for run in finished if run["setting"]["seed"] == 0}
        if not tried:
            continue
        lr = min(tried, key=lambda lr: tried[lr]["valid"])
        losses = {run["setting"]["seed"]: run["valid"] for run in finished if run["setting"]["lr"] == lr}
        exact = exact or losses
        ratios = [math.exp(losses[seed] - exact[seed]) for seed in sorted(losses.keys() & exact.keys())]
        columns = [method.label, ", ".join(f"{losses[seed]:.4f}" for seed in sorted(losses))]
        columns += ["" if exact is losses else percent(ratios)]
        columns += [f"{tried[lr][key] / 2**20:,.0f}" for key in ("state_bytes", "peak_bytes")]
        columns += [f"{lr:g}", ", ".join(f"{lr:g}: {tried[lr]['valid']:.4f}" for lr in sorted(tried))]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def untuned_table(stored: dict[str, Rows]) -> str:
    """Methods without a search, at the settings that are best for exact states."""
    untuned, first = stored.get("untuned", {}), next(iter(stored["methods"]))
    exact = untuned.get(first, stored["methods"][first])  # where exact states were run again beside them, these
    lines = ["| states | state | test perplexity by seed | against exact, same seeds |", "|---|---|---|---|"]
    for row in untuned.values():
        test = row["best"]["test"]
        by_seed = ", ".join(f"{test[seed]:.2f}" for seed in sorted(test))
        apart = "" if row is exact else f"{100 * (mean(paired(row['best'], exact['best'])) - 1):+.2f} %"
        lines.append(f"| {row['label']} | {share(row, exact)} | {by_seed} | {apart} |")
    return "\n".join(lines)


def cost_table(rows: Rows) -> str:
    """Time and temporaries of one step of both tables."""
    lines = ["| optimizer of both tables | ms | against SparseAdam | temporaries |", "|---|---|---|---|"]
    for row in rows.values():
        transient = row["transient_bytes"] / 2**20
        lines.append(f"| {row['label']} | {row['milliseconds']:.2f} | {row['ratio']:.2f} | {transient:.1f} MiB |")
    return "\n".join(lines)


def dense_cost_table(rows: Rows) -> str:
    """Time, state and temporaries of one step under dense gradients."""
    lines = ["| optimizer of the table | ms | against fused | state, B/param | temporaries |", "|---|---|---|---|---|"]
    parameters = rows["fused"]["state_bytes"] / 8
    for row in rows.values():
        state, transient = row["state_bytes"] / parameters, row["transient_bytes"] / 2**20
        lines.append(
            f"| {row['label']} | {row['milliseconds']:.0f} | {row['ratio']:.1f} | {state:.2g} | {transient:.1f} MiB |"
        )
    return "\n".join(lines)


def share(row: dict[str, Any], exact: dict[str, Any]) -> str:
    """State bytes as a fraction of the exact optimizer's."""
    ratio = exact["state_bytes"] / row["state_bytes"]
    return "1" if ratio == 1 else f"1/{ratio:.2g}" if ratio < 10 else f"1/{ratio:,.0f}"


def perplexity(chosen: dict[str, Any]) -> str:
    """Mean and range over seeds; a dash where only the tuning seed was run."""
    test = chosen["test"]
    if test is None:
        return "-"
    values = list(test.values())
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    fewer = f", {len(values)} seeds" if len(values) < 3 else ""
    return f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f}{fewer})"


def against(chosen: dict[str, Any], exact: dict[str, Any]) -> str:
    """Relative difference to an exact optimizer, on test if both have it, else on validation."""
    if chosen is exact:
        return ""
    if chosen["test"] and exact["test"]:
        return percent(paired(chosen, exact))
    return f"{100 * (chosen['valid'] / exact['valid'] - 1):+.1f} % (valid)"


def paired(chosen: dict[str, Any], exact: dict[str, Any]) -> list[float]:
    """Ratios of test perplexity by seed: a seed fixes the first weights, the batches and the negatives."""
    seeds = chosen["test"].keys() & exact["test"].keys()
    return [chosen["test"][seed] / exact["test"][seed] for seed in sorted(seeds)]


def percent(ratios: list[float]) -> str:
    """Mean and range, as percentages above one."""
    if len(ratios) == 1:
        return f"{100 * (ratios[0] - 1):+.1f} %"
    low, middle, high = (100 * (value - 1) for value in (min(ratios), mean(ratios), max(ratios)))
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def plot(rows: Rows, title: str, path: Path) -> None:
    """Perplexity against state bytes; a star is an exact optimizer, a small dot one seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=110)
    measure = "test" if all(row["best"]["test"] for row in rows.values()) else "valid"
    values = {
        name: median(row["best"]["test"].values()) if measure == "test" else row["best"]["valid"]
        for name, row in rows.items()
    }
    for name, row in rows.items():
        value = values[name]
        exact = "exact" in row["label"]
        axes.plot(row["state_bytes"] / 2**20, value, "*" if exact else "o", color="black" if exact else "tab:blue")
        if measure == "test":  # every seed, small
            seeds = list(row["best"]["test"].values())
            axes.plot([row["state_bytes"] / 2**20] * len(seeds), seeds, ".", color="gray", markersize=3)
        axes.annotate(name, (row["state_bytes"] / 2**20, value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.axhline(next(iter(values.values())), color="gray", lw=0.7, ls="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = _ticks(*axes.get_ylim())
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("optimizer state, MiB")
    axes.set_ylabel(f"{measure} perplexity (median of seeds) at the method's own best setting")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(high - low)) / 2
    first = math.ceil(low / step)
    every = max(1, round((high - low) / step / 8))
    return [step * k for k in range(first, math.floor(high / step) + 1, every)]


if __name__ == "__main__":
    main()
