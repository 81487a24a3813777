"""A race of ideas: the same work for each, and who knows the unseen poems best?

    python tools/race.py measure [NAME …]  the reference and minikl.ingredients, those
                                           that nbs/measured/race.json lacks
    python tools/race.py run ENTRY.py      an entry from a file, beside the records
    python tools/race.py record ENTRY.py --commit=HASH --by=NAME
                                           enter it into data/race.md, if it is one

An entry may take as much processor time as 300 steps of the reference do on the same
machine. Whatever is finished is kept, so what was interrupted goes on. The rules:
nbs/reference/race.ipynb.
"""
import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from threading import Lock

from fair import (
    CORPORA,
    INGREDIENTS,
    REFERENCE,
    ROOT,
    WORK,
    data_of,
    entry_of,
    is_reference,
)

from minikl.files import OneLineParser, UserError, one_line_errors, write_atomically

MEASURED = ROOT / "nbs" / "measured" / "race.json"
RUNS = ROOT / "out" / "race" / "runs.json"   # of files
RECORDS = ROOT / "data" / "race.md"
# half of Student's 95 % interval, in standard errors, by the number of seeds
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
# bits, 95 %: an error in the number of steps, which nbs/reference/race.ipynb measures
CLOCK = 0.014


# ---- the queue: each measurement in a process of its own, and kept


class Results:
    "A file of finished measurements, written again after each of them."

    def __init__(self, path, work):
        self.path = Path(path)
        self.lock = Lock()
        self.all = {"work": work, "reference": REFERENCE.idea, "entries": {}}
        if self.path.exists():
            self.all = json.loads(self.path.read_text(encoding="utf-8"))
        if self.all["work"] != work:
            raise UserError(f"{path}: was measured with --work={self.all['work']}")

    def of(self, name, entry):   # {"idea", "options", "ratio", "steps", "bits", …}
        "What is known of an entry. `UserError` if it had other options then."
        new = {"idea": entry.idea, "options": entry.options, "bits": []}
        known = self.all["entries"].setdefault(name, new)
        if known["options"] != entry.options:
            raise UserError(
                f"{self.path}: {name} was measured with other options; "
                "delete it there to measure it again"
            )
        return known

    def save(self):
        entries = self.all["entries"].items()
        begun = {name: one for name, one in entries if "steps" in one}
        text = json.dumps({**self.all, "entries": begun}, ensure_ascii=False, indent=1)
        write_atomically(self.path, text + "\n")


def in_a_process(*arguments):   # what tools/fair.py printed; None after an error
    command = [sys.executable, ROOT / "tools" / "fair.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = {"capture_output": True, "encoding": "utf-8", "env": environment}
    done = subprocess.run(command, **pipes)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(*arguments, done.stderr, sep="\n", file=sys.stderr, flush=True)


def measure_speed(source, known, results, options):
    if "steps" not in known:
        settings = f"--corpus={options.corpus}", f"--work={options.work}"
        found = in_a_process(source, *settings)
        if found:
            known.update(found)
            text = f"{source}: ratio {found['ratio']}, so {found['steps']} steps"
            print(text, flush=True)
            with results.lock:
                results.save()


def measure_seed(job, results, options):
    source, known, seed = job
    if "steps" not in known:   # its speed could not be measured
        return
    settings = f"--corpus={options.corpus}", f"--steps={known['steps']}"
    found = in_a_process(source, f"--seed={seed}", *settings)
    if found:
        print(f"{source}, seed {seed}: {found['bits']:.2f}", flush=True)
        with results.lock:
            known["bits"][seed] = found["bits"]
            known["parameters"] = found["parameters"]
            results.save()


def measure_all(sources, results, options):   # {source: what is known of it}
    "Whatever is not measured yet: first how fast each entry is, then its seeds."
    entries = {source: entry_of(source) for source in sources}
    known = {}
    jobs = []
    for source, entry in entries.items():
        data_of(entry, options.corpus)   # built here, once
        known[source] = results.of(key_of(source), entry)
        bits = known[source]["bits"]
        bits += [None] * (options.seeds - len(bits))
        jobs += [(source, known[source], i) for i, n in enumerate(bits) if n is None]
    if jobs:
        print(f"{len(jobs)} runs to make, {options.jobs} at a time", flush=True)
    settings = {"results": results, "options": options}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(partial(measure_speed, **settings), known, known.values()))
        list(pool.map(partial(measure_seed, **settings), jobs))
    return known


def key_of(source):   # text
    "By what an entry is known: a file by its name and by what is in it."
    if not source.endswith(".py"):
        return source
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return f"{Path(source).stem} {digest[:8]}"


# ---- what is said about it


def interval(bits):   # (mean, half of its 95 % interval by Student's t)
    if len(bits) < 2:
        return bits[0], math.inf
    return mean(bits), STUDENT[len(bits)] * stdev(bits) / len(bits) ** 0.5


def result_of(source, known):   # (mean, half of its 95 % interval)
    "The interval has two parts: what the seeds change, and what the clock does."
    average, half = interval(known["bits"])
    clock = 0 if is_reference(entry_of(source)) else CLOCK   # 300 by definition
    return average, math.hypot(half, clock)


def reference_bits(results):   # list of float; [] as long as they are not measured
    entries = results.all["entries"]
    if results.path == RUNS and MEASURED.exists():   # the same race
        entries = json.loads(MEASURED.read_text(encoding="utf-8"))["entries"]
    bits = entries.get(REFERENCE.idea, {"bits": []})["bits"]
    return [] if None in bits else bits


def line_of(source, known, results):   # text
    average, half = result_of(source, known)
    bits = " ".join(f"{n:.2f}" for n in known["bits"])
    text = (
        f"{source}: ratio {known['ratio']}, {known['steps']} steps, {bits} → "
        f"{average:.2f} ± {half:.2f} bits per character"
    )
    reference = reference_bits(results)
    if reference and source != REFERENCE.idea:
        theirs = mean(reference)
        word = "better" if average < theirs else "worse"
        text += f"; reference {theirs:.2f}, {abs(theirs - average):.2f} {word}"
    return text


def read_records():   # list of (bits per character, line of data/race.md)
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    rows = [line for line in lines if re.match(r"\| *\d", line)]
    return [(float(row.split("|")[3].split("±")[0]), row) for row in rows]


def is_real(options):   # bool: the race of the records, or something tried out
    return (options.corpus, options.work) == ("poetry", WORK)


def results_for(options, path):   # Results
    if not is_real(options):
        path = RUNS.with_name(f"{options.corpus} {options.work}.json")
    return Results(path, options.work)


def measure(options):
    sources = options.names or [REFERENCE.idea, *INGREDIENTS]
    results = results_for(options, MEASURED)
    known = measure_all(sources, results, options)
    missing = [name for name, one in known.items() if None in one["bits"]]
    for source, one in known.items():
        if source not in missing:
            print(line_of(source, one, results))
    if missing:
        raise UserError(f"not measured: {', '.join(missing)}; see above")


def run(options):   # (what is known of the entry, whether it is a new record)
    "Measure one entry from a file, and say where it stands among the records."
    source, *others = options.names or [""]
    if others or not source.endswith(".py"):
        raise UserError(f"expected one file: race.py {options.what} ENTRY.py")
    results = results_for(options, RUNS)
    known = measure_all([source], results, options)[source]
    if None in known["bits"]:
        raise UserError(f"{source}: not measured; see above")
    records = read_records()
    print("records:", *(row for _, row in records), sep="\n")
    print(line_of(source, known, results))
    average, half = result_of(source, known)
    best = min((bits for bits, _ in records), default=math.inf)
    text = f"{average + half:.3f} at most, and the best so far is {best}"
    if not is_real(options) or options.seeds != 3:
        print("No record: this race is not that of the records.")
    elif average + half < best:
        print(f"A new record: {text}.")
        print(f"To enter it: race.py record {source} --commit=HASH --by=NAME")
        return known, True
    else:
        print(f"No record: {text}.")
    return known, False


def record(options):
    "Append a row to data/race.md, if the entry is a new record."
    if not options.commit or not options.by:
        raise UserError("a row of the table needs --commit=HASH and --by=NAME")
    known, is_new = run(options)
    if not is_new:
        raise UserError(f"{options.names[0]}: no row was added to {RECORDS.name}")
    average, half = result_of(options.names[0], known)
    number = len(read_records()) + 1
    cells = [number, date.today(), f"{average:.3f} ± {half:.3f}", known["steps"]]
    cells += [known["idea"], options.commit, options.by]
    row = " | ".join(str(cell).replace("|", "/") for cell in cells)
    text = RECORDS.read_text(encoding="utf-8").rstrip()
    write_atomically(RECORDS, f"{text}\n| {row} |\n")
    print(f"added to {RECORDS.name}: | {row} |")


def main(argv=None):
    parser = OneLineParser(
        "race.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    commands = {"measure": measure, "run": run, "record": record}
    cores = os.cpu_count() or 1
    add("what", choices=commands)
    add("names", nargs="*", help="of ingredients, or a file")
    add("--jobs", type=int, default=cores, help="measurements at a time, a core each")
    add("--seeds", type=int, default=3, choices=range(1, 9), help="runs of an entry")
    add("--work", type=int, default=WORK, help="steps of the reference")
    add("--corpus", choices=CORPORA, default="poetry", help="another: to try it out")
    add("--commit", default="", help="of a record: where its entry is")
    add("--by", default="", help="of a record: whose idea it is")
    with one_line_errors():
        options = parser.parse_intermixed_args(argv)
        if options.jobs < 1 or options.work < 1:
            raise UserError("--jobs and --work: expected 1 or more")
        commands[options.what](options)


if __name__ == "__main__":
    main()
