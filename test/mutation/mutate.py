"""Change constants, signs, transposes and normalisations, one at a time, and run the tests.

``make mutate`` runs all mutants of ``mutants.txt``; what was done before is not repeated, so that
an interrupted run can be continued.

Usage: python mutate.py [--only TEXT] [--jobs N] [--update] [--fresh] [--again] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutation_list
import mutation_sites
from mutation_list import FATES, Entry
from mutation_runner import Bench, Outcome, changed_functions, copy_checkout, judge, preload, serve
from mutation_sites import ROOT, Site, all_sites, choose
from mutation_tests import Reach


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants; return 1 if one survives without explanation, or where none may."""
    options = _options(arguments)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl"
    if options.fresh:
        results.unlink(missing_ok=True)
        for path in options.work.glob("reach-*.json"):
            path.unlink()
    before = mutation_list.read(mutation_list.FILE.read_text(encoding="utf-8"))
    current = {site.key: site for site in all_sites()}
    if options.update:
        sites = choose(list(current.values()), options.per_stratum)
    else:
        gone = [entry for entry in before if entry.site.key not in current]
        if gone:
            _say(f"{len(gone)} mutants of the list have no place any more: use --update.")
            return 1
        sites = [current[entry.site.key] for entry in before]
    wanted = [site for site in sites if _matches(site, options.only)]
    done = _read_results(results)
    if options.again:
        done = {key: outcome for key, outcome in done.items() if outcome.fate == "killed"}
    todo = [site for site in wanted if _fingerprint(site) not in done]
    # what counts most comes first, and then a bit of everything
    todo.sort(key=lambda site: (site.critical is None, site.digest))
    _say(f"{len(wanted)} mutants, {len(todo)} to run.")
    start = time.monotonic()
    if todo:
        preload()
        copy = copy_checkout(options.work)
        _check_runner(copy)
        reach = Reach(copy)
        reach.load(_say, lambda file: not any(text in file for text in options.skip))
        for entry in before:
            if entry.fate == "killed":
                reach.note(entry.site, entry.by)
        for site in sites:
            if _fingerprint(site) in done:
                reach.note(site, done[_fingerprint(site)].by)
        _run_all(todo, copy, reach, options.jobs, results)
        done = _read_results(results)
    fates = {
        site: (done[_fingerprint(site)].fate, done[_fingerprint(site)].by)
        for site in wanted
        if _fingerprint(site) in done
    }
    entries = mutation_list.updated(sites, fates, before)
    if options.update:
        mutation_list.FILE.write_text(mutation_list.write(entries), encoding="utf-8")
    shown = [entry for entry in entries if entry.site in fates]
    seconds = sum(done[_fingerprint(entry.site)].seconds for entry in shown)
    return _summary(shown, seconds, time.monotonic() - start)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="mutants with this in name, place or group")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are run at once")
    parser.add_argument("--update", action="store_true", help="choose anew and write the list")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--again", action="store_true", help="run survivors again")
    parser.add_argument("--skip", nargs="*", default=[], help="files of tests to leave out")
    parser.add_argument("--per-stratum", type=int, default=1, help="for --update: mutants of each")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutation")
    return parser.parse_args(arguments)


def _matches(site: Site, texts: list[str] | None) -> bool:
    place = f"{mutation_list.name(site)} {site.module}:{site.function} {site.operator}"
    return not texts or any(text in f"{place} {site.critical or ''}" for text in texts)


def _fingerprint(site: Site) -> str:
    """Return what a result is valid for: a mutant and the source of its module."""
    source = (ROOT / site.module).read_bytes()
    return hashlib.sha256(source + site.digest.encode()).hexdigest()[:20]


def _read_results(path: Path) -> dict[str, Outcome]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["of"]: Outcome(**line["outcome"]) for line in lines}


def _run_all(todo: list[Site], copy: Path, reach: Reach, jobs: int, results: Path) -> None:
    """Run mutants: those of constants and defaults with new modules, and those of functions."""
    trees: dict[Site, ast.Module] = {}
    for module in {site.module for site in todo}:
        source = (copy / module).read_text(encoding="utf-8")
        trees |= mutation_sites.mutate(source, [site for site in todo if site.module == module])
    functions = [
        site
        for site in todo
        if changed_functions(copy, site.module, trees[site])
        and reach.by_function[f"{site.module}:{site.function}"]  # else: called by the import only
    ]
    others = [site for site in todo if site not in functions]

    def with_modules(site: Site, nodeids: list[str], tag: str) -> Outcome:
        limit = 4 * reach.expected(nodeids) + 40
        return judge(copy, {site.module: trees[site]}, nodeids, limit, tag)

    def work(bench: Bench) -> None:
        def with_functions(site: Site, nodeids: list[str], tag: str) -> Outcome:
            limit = 4 * reach.expected(nodeids) + 40
            return bench.judge(site.module, trees[site], nodeids, limit, tag)

        _in_processes(functions, with_functions, reach, jobs, results)

    if functions:
        _serve(functions, reach, copy, work)
    _in_processes(others, with_modules, reach, jobs, results)


def _serve(functions: list[Site], reach: Reach, copy: Path, work: Callable[[Bench], None]) -> None:
    """Collect the tests of mutants in a fork, so that this process has no modules loaded."""
    called = {f"{site.module}:{site.function}" for site in functions}
    wanted = dict.fromkeys(n for function in called for n in reach.by_function[function])
    _say(f"Collecting {len(wanted)} tests of {len(functions)} mutants.")
    pid = os.fork()
    if pid:
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("Not all mutants were run; see above.")
        return
    status = 1
    try:
        serve(copy, list(wanted), work)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _in_processes(
    todo: list[Site],
    run: Callable[[Site, list[str], str], Outcome],
    reach: Reach,
    jobs: int,
    results: Path,
) -> None:
    """Run mutants in several processes, each of which takes every so manieth."""
    children = []
    for job in range(jobs):
        pid = os.fork() if jobs > 1 else 0
        if pid:
            children.append(pid)
            continue
        status = 1
        try:
            for index in range(job, len(todo), jobs):
                site = todo[index]
                outcome = _run(site, run, reach, f"mutant-{job}")
                if outcome.fate == "killed":
                    reach.note(site, outcome.by)
                _store(site, outcome, results)
                _say(
                    f"{index + 1}/{len(todo)} {mutation_list.name(site)} {site.module}:{site.line} "
                    f"{outcome.fate} {outcome.seconds} s {outcome.by}"
                )
            status = 0
        except Exception:
            if jobs == 1:
                raise
            traceback.print_exc()
        finally:
            if jobs > 1:
                os._exit(status)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if any(statuses):
        raise RuntimeError("Not all mutants were run; see above.")


def _check_runner(copy: Path) -> None:
    """Raise if tests fail without a mutant, or pass with a module that cannot be imported."""
    module = "curvlinops/kronecker.py"
    wanted = [f"{module}::curvlinops.kronecker.KroneckerProductLinearOperator"]
    plain = judge(copy, {}, wanted, 60.0, "check")
    trees = {module: ast.parse("raise ImportError('mutant')")}
    broken = judge(copy, trees, wanted, 60.0, "check")
    if (plain.fate, plain.tests, broken.fate) != ("survived", 1, "killed"):
        raise RuntimeError(f"Mutants do not reach the tests: {plain}, {broken}.")


def _store(site: Site, outcome: Outcome, results: Path) -> None:
    line: dict[str, Any] = {"of": _fingerprint(site), "name": mutation_list.name(site)}
    line["outcome"] = vars(outcome)
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _run(
    site: Site, run: Callable[[Site, list[str], str], Outcome], reach: Reach, tag: str
) -> Outcome:
    """Run tests, the nearest first, until one fails."""
    total = Outcome("survived")
    for nodeids in reach.runs(site):
        outcome = run(site, nodeids, tag)
        total.tests += outcome.tests
        total.seconds = round(total.seconds + outcome.seconds, 1)
        if outcome.fate != "survived":
            total.fate, total.by = outcome.fate, outcome.by
            break
    return total


def _summary(entries: list[Entry], seconds: float, now: float) -> int:
    """Show how many mutants survived, and which."""
    fates = Counter(entry.fate for entry in entries)
    survivors = [entry for entry in entries if entry.fate in ("survived", "equivalent")]
    bad = [entry for entry in survivors if not entry.allowed]
    for entry in survivors:
        site = entry.site
        group = f" [{site.critical}]" if site.critical else ""
        _say(f"\n{mutation_list.name(site)} {site.module}:{site.line} {site.function}{group}")
        _say(f"  - {site.original}\n  + {site.mutated}\n  {entry.fate}: {entry.by}")
    counts = ", ".join(f"{fates[fate]} {fate}" for fate in FATES)
    _say(f"\n{len(entries)} mutants: {counts}. Tests took {seconds:.0f} s, this run {now:.0f} s.")
    if bad:
        _say(f"{len(bad)} survivors must not be, or are not explained.")
    return 1 if bad else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
