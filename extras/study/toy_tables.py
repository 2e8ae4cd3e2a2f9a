"""The tables of the toy study in EXPERIMENTS.md and its figure, from extras/study/toy.jsonl alone.

    python extras/study/toy_tables.py                        # replaces the text between two marks

All figures are win rates in percent on the 300 questions of eval.jsonl: means over seeds with their
standard error. A difference is paired: seed by seed, the same world and questions."""
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import mean_and_error
from extras.report.arms import pm
from extras.study.tables import markdown_table
from extras.study.toy import PAPER_SHARE, PAPER_SHARES
from plumbing.command_line import load_config
from plumbing.files import check_input, replacing
from plumbing.ranks import fail, say
from plumbing.record import logged

BEGIN = "<!-- tables: python extras/study/toy_tables.py -->"
END = "<!-- end of the toy study's tables -->"


@dataclass(frozen=True)
class Config:
    data: str = "extras/study/toy.jsonl"
    out: str = "EXPERIMENTS.md"
    figure: str = "docs/horizons.svg"


NAMES = {"rlhf": "PPO-RLHF", "sequence": "sequence level", "gamma1": "token level, gamma 1",
         "gamma05": "token level, gamma 0.5", "gamma0": "token level, gamma 0"}


# ---------------------------------------------------------------- cells of the study

def by_name(rows):
    """(world, name) -> {seed: its row}"""
    found = defaultdict(dict)
    for row in rows:
        found[row["world"], row["name"]][row["seed"]] = row
    return found


def last(row):
    """The figures of a row's last model"""
    return row["curve"][max(row["curve"], key=int)]


def win(rows, figure="win_rate"):
    """{seed: row} -> "mean ± error over seeds" of the last model"""
    if not rows:
        return "-"
    values = [last(row)[figure] for row in rows.values()]
    return pm(*mean_and_error(values), 1 if figure == "win_rate" else 2)


def difference(rows, others, step=None):
    """{seed: row} of two arms -> the paired difference "mean ± error" at a step, or at the end"""
    values = []
    for seed in rows.keys() & others.keys():
        a, b = rows[seed], others[seed]
        if step is None:
            values.append(last(a)["win_rate"] - last(b)["win_rate"])
        elif str(step) in a["curve"] and str(step) in b["curve"]:
            values.append(a["curve"][str(step)]["win_rate"] - b["curve"][str(step)]["win_rate"])
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:+.1f}" + (f" ± {error:.1f}" if error is not None else "")


def first_step_above(row, level):
    """The first judged step from which a run's win rate stays above a level; None: never"""
    found = None
    for step in sorted(map(int, row["curve"]), reverse=True):
        if row["curve"][str(step)]["win_rate"] <= level:
            return found
        found = step
    return found


def seeds_of(rows):
    return ", ".join(str(seed) for seed in sorted(rows))


# ---------------------------------------------------------------- the tables

def grid_table(found):
    """Each arm's cells; the best share of each way of credit is bold. (3): a cell of fewer seeds"""
    rows = []
    for arm, credits in (("rlhf", ("lam1", "lam98", "lam95", "lam90")),
                         ("sequence", ("lam1", "lam98", "lam95", "lam90")),
                         ("token", ("gamma1", "mean", "gamma0"))):
        for credit in credits:
            shares = shares_of(found, f"grid_{arm}_{credit}_kl")
            means = {}
            seeds = {}
            for share in shares:
                cells = found["medium", f"grid_{arm}_{credit}_kl{share}"]
                means[share] = mean_and_error([last(row)["win_rate"] for row in cells.values()])
                seeds[share] = len(cells)
            if not means:
                continue
            best = max(means.values())
            row = [arm, credit]
            for share in ALL_SHARES:
                cell = pm(*means[share]) if share in means else "-"
                cell = f"**{cell}**" if means.get(share) == best else cell
                row.append(f"{cell} ({seeds[share]})" if seeds.get(share, 6) < 6 else cell)
            rows.append(row)
    header = ["arm", "credit", *[f"KL {share}" for share in ALL_SHARES]]
    return markdown_table(header, rows)


def paper_table(found):
    """Eq. 4 as in the paper, with other weights of the KL"""
    rows = []
    for credit in ("gamma1", "gamma0"):
        cells = [found.get(("medium", f"paper_{credit}_kl{share:g}"), {}) for share in PAPER_SHARES]
        if any(cells):
            rows.append([credit, *map(win, cells)])
    return markdown_table(["credit", *[f"KL {share:g}" for share in PAPER_SHARES]], rows)


ALL_SHARES = ("0.005", "0.01", "0.02", "0.04", "0.08", "0.16", "0.32")


def shares_of(found, prefix):
    return [share for share in ALL_SHARES if ("medium", prefix + share) in found]


def lengths_table(found):
    """What the chosen arms still gain over the last quarter of longer runs"""
    rows = []
    for steps in (100, 150):
        for arm in ("sequence", "gamma1", "gamma0"):
            cells = found.get(("medium", f"lengths_{arm}_{steps}"), {})
            if not cells:
                continue
            gains = []
            for row in cells.values():
                three_quarters = max(s for s in map(int, row["curve"]) if s <= 0.75 * steps)
                gains.append(last(row)["win_rate"]
                             - row["curve"][str(three_quarters)]["win_rate"])
            rows.append([NAMES[arm], steps, win(cells), pm(*mean_and_error(gains))])
    header = ["arm", "steps", "at the end", "gained over the last quarter"]
    return markdown_table(header, rows)


def sft_table(found):
    """Settings of SFT on the edited answers"""
    rows = []
    for (_, name), cells in found.items():
        if name.startswith("sft_lr"):
            lr, epochs = name.removeprefix("sft_lr").split("_epochs")
            rows.append([float(lr), int(epochs), win(cells), seeds_of(cells)])
    rows.sort()
    return markdown_table(["lr", "epochs", "win rate", "seeds"], rows)


HORIZONS = (("short", "3 to 5"), ("medium", "8 to 12"), ("long", "20 to 30"))


def horizons_summary(found):
    """(a) in one row a horizon, as README has it"""
    rows = []
    for world, items in HORIZONS:
        arms = {arm: found.get((world, f"horizons_{arm}"), {}) for arm in NAMES}
        if not arms["sequence"] or not arms["gamma0"]:
            continue
        ceilings = [row["ceiling"] for row in arms["sequence"].values()]
        row = [items, f"{mean_and_error(ceilings)[0]:.1f}"]
        row += [win(arms[arm]) for arm in ("sequence", "gamma1", "gamma05", "gamma0")]
        row += [difference(arms["gamma0"], arms["sequence"], step) for step in (10, 25, None)]
        rows.append(row)
    header = ["items", "ceiling", "sequence level", "gamma 1", "gamma 0.5", "gamma 0",
              "gamma 0 minus sequence level at step 10", "at step 25", "at the end"]
    return markdown_table(header, rows)


def horizons_table(found):
    """(a): one row a horizon and arm"""
    rows = []
    for world, items in HORIZONS:
        sequence = found.get((world, "horizons_sequence"), {})
        for arm in NAMES:
            cells = found.get((world, f"horizons_{arm}"), {})
            if not cells:
                continue
            ceilings = mean_and_error([row["ceiling"] for row in cells.values()])[0]
            row = [items, NAMES[arm], f"{ceilings:.1f}", win(cells)]
            row += [difference(cells, sequence) if arm != "sequence" else ""]
            row += [difference(cells, sequence, step) if arm != "sequence" else ""
                    for step in (10, 25, 50)]
            row.append(catches_up(cells, sequence) if arm != "sequence" else "")
            row.append(len(cells))
            rows.append(row)
    header = ["items", "arm", "ceiling", "at the end", "minus sequence level", "at step 10", "25",
              "50", "above its end from step", "seeds"]
    return markdown_table(header, rows)


def catches_up(cells, sequence):
    """For each seed the step from which a run stays above the sequence level's final mean"""
    if not sequence:
        return "-"
    level = mean_and_error([last(row)["win_rate"] for row in sequence.values()])[0]
    steps = [first_step_above(row, level) for _, row in sorted(cells.items())]
    return ", ".join("never" if step is None else str(step) for step in steps)


def simple_table(found, title, names):
    """Rows of names: (what it is called, world, cell's name)"""
    rows = []
    for words, world, name in names:
        cells = found.get((world, name), {})
        if cells:
            rows.append([words, win(cells), win(cells, "flaws"), win(cells, "over"),
                         win(cells, "under"), seeds_of(cells)])
    header = [title, "win rate", "flaws", "items too many", "too few", "seeds"]
    return markdown_table(header, rows) if rows else ""


def reward_models_table(found):
    """Accuracy on both kinds of pairs and the probe, of every reward model of the medium world"""
    kinds = []
    for (world, _), cells in found.items():
        for row in cells.values():
            if world == "medium" and "probe" in row:
                kinds += [kind for kind in row["probe"] if kind not in kinds]
    rows = []
    for (world, name), cells in sorted(found.items()):
        mine = [row for row in cells.values() if "probe" in row and row["seed"] >= 300]
        if world != "medium" or not mine:
            continue
        row = [name, pm(*mean_and_error([r["accuracy"] for r in mine])),
               pm(*mean_and_error([r["accuracy_edited"] for r in mine]))]
        row += [pm(*mean_and_error([r["probe"][kind] for r in mine]), 0) for kind in kinds]
        rows.append([*row, len(mine)])
    header = ["reward model", "accuracy, original pairs", "edited pairs", *kinds, "seeds"]
    return markdown_table(header, rows) if rows else ""


# ---------------------------------------------------------------- the figure

COLOURS = {"gamma0": "#0072b2", "gamma05": "#56b4e9", "gamma1": "#009e73", "sequence": "#d55e00"}
WIDTH, HEIGHT, GAP, LEFT, TOP = 250, 230, 30, 56, 34  # of a panel and its margins, in pixels


def figure(found):
    """(a) as an SVG: a panel a horizon; x: PPO steps, y: win rate, mean over seeds"""
    parts = []
    for number, (world, items) in enumerate(HORIZONS):
        parts.append(panel(found, world, f"{items} items", LEFT + number * (WIDTH + GAP)))
    middle = LEFT + (3 * WIDTH + 2 * GAP) / 2
    parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 32}" text-anchor="middle">'
                 'PPO steps</text>')
    side = TOP + HEIGHT / 2
    parts.append(f'<text x="12" y="{side}" text-anchor="middle" transform="rotate(-90 12 {side})">'
                 'win rate, %</text>')
    x = LEFT
    for arm, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{TOP + HEIGHT + 50}" width="18" height="4" '
                     f'fill="{colour}"/><text x="{x + 24}" y="{TOP + HEIGHT + 56}">'
                     f'{NAMES[arm]}</text>')
        x += 190
    width = LEFT + 3 * WIDTH + 2 * GAP + 20
    height = TOP + HEIGHT + 68
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" '
            f'fill="#333"><rect width="{width}" height="{height}" fill="#fff"/>'
            f'{"".join(parts)}</svg>\n')


def panel(found, world, words, left):
    low, high = 0, 90
    cells = {arm: found.get((world, f"horizons_{arm}"), {}) for arm in COLOURS}
    steps = [int(step) for rows in cells.values() for row in rows.values() for step in row["curve"]]
    last_step = max(steps, default=100)

    def at(step, rate):
        x = left + WIDTH * step / last_step
        y = TOP + HEIGHT * (1 - (rate - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{words}</text>']
    for rate in range(low, high + 1, 10):
        y = at(0, rate).split(",")[1]
        parts.append(f'<path d="M{left} {y}h{WIDTH}" stroke="#ddd"/>')
        if rate % 20 == 0:
            parts.append(f'<text x="{left - 6}" y="{float(y) + 4}" text-anchor="end">{rate}</text>')
    for step in range(0, last_step + 1, 25):
        x = at(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{step}</text>')
    ceilings = [row["ceiling"] for rows in cells.values() for row in rows.values()]
    if ceilings:
        y = at(0, mean_and_error(ceilings)[0]).split(",")[1]
        parts.append(f'<path d="M{left} {y}h{WIDTH}" stroke="#888" stroke-dasharray="4 4"/>'
                     f'<text x="{left + WIDTH}" y="{float(y) - 5}" text-anchor="end">'
                     'answers without a flaw</text>')
    for arm, rows in cells.items():
        if not rows:
            continue
        points = []
        band = []
        for step in sorted({int(step) for row in rows.values() for step in row["curve"]}):
            values = [row["curve"][str(step)]["win_rate"] for row in rows.values()
                      if str(step) in row["curve"]]
            mean, error = mean_and_error(values)
            points.append(at(step, mean))
            band.append((at(step, mean - (error or 0)), at(step, mean + (error or 0))))
        outline = [high for _, high in band] + [low for low, _ in reversed(band)]
        parts.append(f'<polygon points="{" ".join(outline)}" fill="{COLOURS[arm]}" '
                     'fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" '
                     f'stroke="{COLOURS[arm]}" stroke-width="2"/>')
    return "".join(parts)


# ---------------------------------------------------------------- EXPERIMENTS.md

EDITS = [(f"{NAMES[arm]}: {words}", world, f"edits_{arm}")
         for arm in ("sequence", "gamma0")
         for world, words in (("noise0", "no wrong labels"), ("medium", "25% wrong labels"),
                              ("noise40", "40% wrong labels"), ("fixes50", "half of them fixed"),
                              ("fixes75", "three quarters fixed"), ("fixes100", "all fixed"),
                              ("medium_line", "as many flaws a line as in short answers"))]
LOSSES = [(f"{words}, {NAMES[arm]}", "medium", f"losses_{arm}_{name}")
          for name, words in (("rm_token", "Eq. 4 + anchor 0.3, gaps"), ("rm_plain", "Eq. 4, gaps"),
                              ("rm_paper", "Eq. 4"),
                              ("rm_paper_own_kl", f"Eq. 4, KL {PAPER_SHARE:g}"),
                              ("rm_no_gaps", "Eq. 4 + anchor 0.3"), ("rm_eq3", "Eq. 3, gaps"),
                              ("rm_eq3_anchor", "Eq. 3 + anchor 0.3, gaps"),
                              ("rm_sum", "Eq. 4 as a sum, anchor 0.3, gaps"),
                              ("rm_keep", "likelihood that a token is kept"))
          for arm in ("gamma0", "gamma1")]
WHY = [("gamma 0", "medium", "why_gamma0"),
       ("gamma 0, r_t + 0.5", "medium", "why_gamma0_constant"),
       ("gamma 0, r_t + b(s_t)", "medium", "why_gamma0_state"),
       ("gamma 1", "medium", "why_gamma1"),
       ("gamma 1, r_t + 0.5", "medium", "why_gamma1_constant"),
       ("gamma 1, r_t + b(s_t)", "medium", "why_gamma1_state"),
       ("gamma 1, lam 0", "medium", "why_gamma1_lam0")]
ROUNDS = [("all pairs in one round", "medium", "rounds_gamma0_one"),
          ("half of the pairs", "medium", "rounds_gamma0_half"),
          ("half of the pairs, then as many answers of that policy", "medium",
           "rounds_gamma0_two")]
WITHOUT_RL = [("SFT", "medium", "data_sft"), ("SFT on the edited answers", "medium",
                                              "data_sft_edited"),
              ("best of 8 by the model of original pairs", "medium", "data_best_rm_original"),
              ("best of 8 by the sequence-level model of edits", "medium", "data_best_rm_edited"),
              ("best of 8 by the token-level model", "medium", "data_best_rm_token")]


def sections(found):
    """(title, table) of all that is finished"""
    made = [("Settings: each arm's grid (seeds 100 to 105; (3): 100 to 102 alone)",
             grid_table(found)),
            ("Eq. 4 as in the paper: a grid of its own (seeds 100 to 102)", paper_table(found)),
            ("How many steps (seeds 100 to 102)", lengths_table(found)),
            ("SFT on the edited answers (seeds 100 to 102)", sft_table(found)),
            ("(a) Horizons: win rate at the end, and paired differences", horizons_summary(found)),
            ("(a) Every arm", horizons_table(found)),
            ("(b) Without RL", simple_table(found, "policy", WITHOUT_RL)),
            ("(b) Reward models", reward_models_table(found)),
            ("(c) Labels and editors", simple_table(found, "pairs", EDITS)),
            ("(d) Losses", simple_table(found, "reward model and PPO", LOSSES)),
            ("(e) Rounds", simple_table(found, "edits", ROUNDS)),
            ("(f) Why", simple_table(found, "PPO", WHY))]
    return [(title, table) for title, table in made if table.count("\n") > 1]


def main(cfg):
    check_input(cfg.data, "data", "python extras/study/toy.py grid")
    text = Path(cfg.out).read_text(encoding="utf-8") if Path(cfg.out).exists() else BEGIN + END
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        fail(f"--out={cfg.out} has no place for the tables: it needs the lines {BEGIN} and {END}, "
             "once each")
    found = by_name(logged(Path(cfg.data)))
    made = [f"### {title}\n\n{table}\n" for title, table in sections(found)]
    before = text.split(BEGIN)[0]
    after = text.split(END)[1]
    with replacing(cfg.out) as file:
        file.write(f"{before}{BEGIN}\n\n" + "\n".join(made) + f"\n{END}{after}")
    say(f"{cfg.out}: {len(made)} tables")
    if any(name.startswith("horizons_") for _, name in found):
        with replacing(cfg.figure) as file:
            file.write(figure(found))
        say(cfg.figure)


if __name__ == "__main__":
    main(load_config(Config, "study"))
