"""Owns the fault plan of the bake: every call of a bake meets every fault, it is killed everywhere, others interfere.

``python -m tests.bake.fault_plan`` runs all of it on the small tree and prints what became of each group of cases, and
how much was left at the cloud: nothing, or it ends with 1. `Case` names are stable, so that a sample can name them.
"""

import argparse
import os
import queue
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bake.answers import given
from tests.bake.harness import Bench, Done, Running, commit, parse_pattern, running_bench

SEED = 7
_MOMENTS = 20
_REBOOTS = 6
_OUTAGES = 3
_AWAY_S = 12.0
_SIGNALS_APART_S = 1.5  # nearer ones count as one
_LATE_S = 65.0  # the client gives up after 60
_LASTS_S = 300.0  # what an action of Hetzner's can take
_DEEPEST = 5  # a call that comes more often than that is a poll
_FORBIDDEN = {"kind": "error", "status": 403, "code": "forbidden", "message": "insufficient permissions"}
# What passes by itself, and which calls can meet it.
_ERRORS = {
    "429 rate_limit_exceeded": 429,
    "409 conflict": 409,
    "423 locked": 423,
    "502 bad_gateway": 502,
    "503 unavailable": 503,
    "504 timeout": 504,
    "500 server_error": 500,
}
# Which site begins an action of each command.
_COMMANDS = {
    "create_server": ("POST", "/v1/servers"),
    "start_server": ("POST", "/v1/servers"),
    "shutdown_server": ("POST", "/v1/servers/*/actions/shutdown"),
    "create_image": ("POST", "/v1/servers/*/actions/create_image"),
    "delete_server": ("DELETE", "/v1/servers/*"),
}


@dataclass(frozen=True)
class Site:
    """A kind of call, ids left open, and how often a clean bake makes it."""

    method: str
    path: str
    count: int

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def where(self) -> tuple[str, str]:
        return self.method, self.path

    def fault(self, **what: Any) -> dict[str, Any]:
        """A fault of the local cloud's plan that strikes here."""
        return {"method": self.method, "path": self.path, **what}


@dataclass(frozen=True)
class Clean:
    """A bake that nothing befell: its calls by site, the lines that begin and end its phases, how long it took."""

    sites: list[Site]
    phases: list[str]
    took_s: float


@dataclass(frozen=True)
class Case:
    """One way to be hit; ``run`` returns what was wrong afterwards."""

    group: str
    name: str
    run: Callable[[Bench], list[str]]


@dataclass(frozen=True)
class Outcome:
    """How a case went; ``left`` is what it left that it should not have."""

    case: Case
    wrong: list[str]
    left: int
    took_s: float


def build(bench: Bench, *words: str) -> Running:
    """Begins the bake that all cases are about."""
    return bench.start("build", "--location", "fsn1,nbg1", *words)


def record(bench: Bench) -> Clean:
    """A clean bake. Fails with what was wrong with it."""
    last = max((call["number"] for call in bench.calls()), default=0)
    running = build(bench, "--promote")
    phases = [line for line in running.lines() if line.startswith("phase ")]
    done = running.finish()
    calls = bench.calls(after=last)  # before the look at what was left makes some of its own
    wrong = _succeeded(bench, done)
    assert not wrong, "\n".join(wrong)
    counts = Counter((call["method"], re.sub(r"/\d+(?=/|$)", "/*", call["path"])) for call in calls)
    bench.clear()
    return Clean([Site(*where, count) for where, count in counts.items()], phases, done.took_s)


def _succeeded(bench: Bench, done: Done, images: int = 1) -> list[str]:
    """What is wrong with a bake that should have gone well and left one image."""
    wrong = [] if done.code == 0 else [f"it ended with {done.code}"]
    wrong += [f"left: {each}" for each in bench.left()]
    wrong += [f"twice: {each}" for each in bench.twice()] if images == 1 else []
    return wrong + ([f"it said:\n{_last(done)}"] if wrong else [])


def _last(done: Done, lines: int = 12) -> str:
    return "\n".join(f"    {line}" for line in (done.said + done.output).splitlines()[-lines:])


# Every call meets what passes.


def _plan_of(sites: list[Site], call: int, **what: Any) -> list[dict[str, Any]]:
    return [site.fault(call=call, **what) for site in sites if site.count >= call]


def _meet(call: int, sites: list[Site], what: dict[str, Any], bench: Bench) -> list[str]:
    """One bake, each of whose sites meets a fault at its n-th call."""
    bench.plan(*_plan_of(sites, call, **what))
    done = build(bench, "--promote").finish()
    wrong = _succeeded(bench, done)
    struck = sum(1 for one in bench.calls() if one["faults"])
    if not wrong and not struck:
        wrong = ["no call met a fault"]
    return wrong


def _ways(clean: Clean) -> Iterator[Case]:
    repeatable = [site for site in clean.sites if site.method != "POST"]
    ways: list[tuple[str, list[Site], dict[str, Any]]] = [
        (name, repeatable if status == 500 else clean.sites, {"kind": "error", "status": status})
        for name, status in _ERRORS.items()
    ]
    ways += [(kind, clean.sites, {"kind": kind}) for kind in ("reset", "lost_answer")]
    servers = [site for site in clean.sites if site.where == _COMMANDS["create_server"]]
    ways.append(("412 resource_unavailable", servers, {"kind": "error", "status": 412}))
    for command, where in _COMMANDS.items():
        beginning = [site for site in clean.sites if site.where == where]
        ways.append((f"action_failed {command}", beginning, {"kind": "action_failed", "command": command}))
    for name, sites, what in ways:
        deepest = min(_DEEPEST, max(site.count for site in sites))
        for call in range(1, deepest + 1):
            yield Case("passing", f"{name}, call {call}", partial(_meet, call, sites, what))


# Every call meets what does not pass.


def _refuse(site: Site, call: int | None, bench: Bench) -> list[str]:
    """One bake that is refused something; afterwards a sweep finds all that it left."""
    fault = site.fault(**_FORBIDDEN) if call is None else site.fault(call=call, **_FORBIDDEN)
    bench.plan(fault)
    done = build(bench, "--promote").finish()
    bench.plan()
    wrong = []
    if done.code == 0 and (call is None or _succeeded(bench, done)):
        wrong.append("it ended with 0")
    elif done.code != 0:
        wrong += [] if re.search(r"^error: ", done.said, re.MULTILINE) else ["it said no error"]
        wrong += [] if "forbidden" in done.said else ["it did not say why"]
    wrong += ["it said a traceback"] if "Traceback" in done.said else []
    wrong += [f"it said:\n{_last(done)}"] if wrong else []
    return wrong + _swept(bench)


def _swept(bench: Bench) -> list[str]:
    """What is wrong after a sweep."""
    swept = bench.run("sweep", "--yes")
    wrong = [] if swept.code == 0 else [f"sweep ended with {swept.code}:\n{_last(swept)}"]
    left = [f"left after sweep: {each}" for each in bench.left()]
    return wrong + left + ([f"sweep said:\n{_last(swept)}"] if left else [])


def _fatal(clean: Clean) -> Iterator[Case]:
    for site in clean.sites:
        yield Case("fatal", f"always {site}", partial(_refuse, site, None))
    for site in clean.sites:
        for call in range(2, site.count + 1 if site.count <= _DEEPEST else 2):
            yield Case("fatal", f"once {site}, call {call}", partial(_refuse, site, call))


# It is killed.


def _kill_at_line(number: int, bench: Bench) -> list[str]:
    running = build(bench, "--promote")
    seen = 0
    for line in running.lines():
        seen += line.startswith("phase ")
        if seen == number:
            running.kill()
            break
    running.finish()
    return _build_again(bench)


def _kill_after(moment_s: float, bench: Bench) -> list[str]:
    running = build(bench, "--promote")
    time.sleep(moment_s)
    running.kill()
    running.finish()
    return _build_again(bench)


def _build_again(bench: Bench) -> list[str]:
    return _succeeded(bench, build(bench).finish())


def _interrupt(moment_s: float, signals: tuple[signal.Signals, ...], bench: Bench) -> list[str]:
    """Asked to end, once or twice, it ends, and takes back what it made."""
    running = build(bench, "--promote")
    time.sleep(moment_s)
    for number in signals:
        running.process.send_signal(number)
        time.sleep(_SIGNALS_APART_S)
    done = running.finish(120)
    wrong = [] if done.code in (0, 130) else [f"it ended with {done.code}"]
    wrong += ["it said a traceback"] if "Traceback" in done.said else []
    if len(signals) == 1:  # snapshots may stay: the next bake goes on from what is whole
        wrong += [f"left: {each}" for each in bench.left() if not each.startswith("snapshot ")]
    wrong += [f"it said:\n{_last(done)}"] if wrong else []
    return wrong + _swept(bench) + _build_again(bench)


def _kills(clean: Clean, seed: int) -> Iterator[Case]:
    for number, line in enumerate(clean.phases, 1):
        name = re.sub(r"( ….*| in [\d.]+ s.*)", "", line)
        yield Case("killed", f"at {number}: {name}", partial(_kill_at_line, number))
    chance = random.Random(seed)
    for number in range(1, _MOMENTS + 1):
        moment_s = chance.uniform(0.1, clean.took_s)
        yield Case("killed", f"random {number}: at {moment_s:.2f} s", partial(_kill_after, moment_s))
    ways = ((signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM))
    for number, signals in enumerate([*ways, *ways], 1):
        moment_s = chance.uniform(0.1, clean.took_s)
        words = " and ".join(each.name for each in signals)
        yield Case("interrupted", f"{number}: {words} at {moment_s:.2f} s", partial(_interrupt, moment_s, signals))


def _reboot_after(moment_s: float, bench: Bench) -> list[str]:
    """As when this machine loses its power: all processes of the bake end at once."""
    running = build(bench, "--promote")
    time.sleep(moment_s)
    running.kill()
    for pid in bench.find_processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.finish()
    return _build_again(bench)


def _reboots(clean: Clean, seed: int) -> Iterator[Case]:
    chance = random.Random(seed + 1)
    for number in range(1, _REBOOTS + 1):
        moment_s = chance.uniform(0.1, clean.took_s)
        yield Case("rebooted", f"{number}: at {moment_s:.2f} s", partial(_reboot_after, moment_s))


# It takes long, or nobody answers for a while.


def _last_long(seconds: float, bench: Bench) -> list[str]:
    bench.plan({"path": "/v1/**", "kind": "action_lasts", "seconds": seconds})
    done = build(bench, "--promote").finish(20 * seconds + 600)
    return _succeeded(bench, done)


def _come_late(clean: Clean, seconds: float, bench: Bench) -> list[str]:
    """Calls that change something are given up, and are done all the same, afterwards."""
    changing = [site for site in clean.sites if site.method != "GET"]
    bench.plan(*(site.fault(call=1, kind="slow_answer", seconds=seconds) for site in changing))
    return _succeeded(bench, build(bench, "--promote").finish(2 * seconds * len(changing) + 600))


def _fall_silent(moment_s: float, bench: Bench) -> list[str]:
    """For a while nobody takes a connection's data."""
    running = build(bench, "--promote")
    time.sleep(moment_s)
    bench.cloud.process.send_signal(signal.SIGSTOP)
    time.sleep(_AWAY_S)
    bench.cloud.process.send_signal(signal.SIGCONT)
    return _succeeded(bench, running.finish())


def _reset_all(moment_s: float, bench: Bench) -> list[str]:
    """For a while each connection is reset."""
    running = build(bench, "--promote")
    time.sleep(moment_s)
    bench.plan({"path": "/v1/**", "kind": "reset"})
    time.sleep(_AWAY_S)
    bench.plan()
    return _succeeded(bench, running.finish())


def _slow(clean: Clean, lasts_s: float) -> Iterator[Case]:
    yield Case("slow", f"each action lasts {lasts_s:.0f} s", partial(_last_long, lasts_s))
    late = partial(_come_late, clean, _LATE_S)
    yield Case("slow", f"each first change is done after {_LATE_S:.0f} s", late)


def _outages(clean: Clean, seed: int) -> Iterator[Case]:
    chance = random.Random(seed + 2)
    for name, way in (("silent", _fall_silent), ("resets", _reset_all)):
        for number in range(1, _OUTAGES + 1):
            moment_s = chance.uniform(0.1, clean.took_s)
            yield Case("outage", f"{number}: {name} for {_AWAY_S:.0f} s at {moment_s:.2f} s", partial(way, moment_s))


# It is not alone.


def _two_bakes(same_state: bool, bench: Bench) -> list[str]:
    """Both go well, however many images that makes, and leave nothing else."""
    other = bench if same_state else replace(bench, state=bench.state.with_name(f"{bench.state.name}-2"))
    other.state.mkdir(exist_ok=True)
    first, second = build(bench, "--promote"), build(other, "--promote")
    wrong = []
    for running in (first, second):
        done = running.finish()
        wrong += [] if done.code == 0 else [f"one ended with {done.code}:\n{_last(done)}"]
    wrong += [f"left: {each}" for each in (*bench.left(), *other.left())]
    if not same_state:
        shutil.rmtree(other.state)
    return wrong + _one_holder(bench)


def _one_holder(bench: Bench) -> list[str]:
    """Whatever was raced, the channel has one holder, and that is a verified image."""
    listed = bench.run("list", "--json")
    if listed.code:
        return [f"list ended with {listed.code}:\n{_last(listed)}"]
    holder = listed.document()["channels"].get("stable")
    return [] if holder in {one.id for one in bench.verified()} else [f"the channel names {holder}"]


def _harass(bench: Bench, verbs: list[list[str]], until: threading.Event, wrong: list[str]) -> None:
    """Runs verbs, one after the other, again and again; they may be refused, but neither break nor harm."""
    while not until.is_set():
        for verb in verbs:
            done = bench.run(*verb)
            lost = done.code in (1, 4) and re.search(r"at the same time|removed meanwhile|is gone", done.said)
            if (done.code not in (0, 3) and not lost) or "Traceback" in done.said:
                wrong.append(f"{' '.join(verb)} ended with {done.code}:\n{_last(done)}")
                return


def _race_with_bake(verbs: list[list[str]], elsewhere: bool, bench: Bench) -> list[str]:
    """A bake goes well while somebody sweeps, prunes and promotes, here or on another machine."""
    first = build(bench, "--promote").finish()
    wrong = _succeeded(bench, first)
    if wrong:
        return wrong
    keep = bench.verified()[0]
    told = [[str(keep.id) if word == "ID" else word for word in verb] for verb in verbs]
    other = replace(bench, state=bench.state.with_name(f"{bench.state.name}-2")) if elsewhere else bench
    other.state.mkdir(exist_ok=True)
    (bench.tree / "service" / "change").write_text(f"{time.time()}\n")
    commit(bench.tree, "A change")
    over = threading.Event()
    harassing = threading.Thread(target=_harass, args=(other, told, over, wrong))
    harassing.start()
    try:
        done = build(bench, "--promote").finish()
    finally:
        over.set()
        harassing.join()
    wrong += [] if done.code == 0 else [f"the bake ended with {done.code}:\n{_last(done)}"]
    wrong += [f"left: {each}" for each in bench.left()]
    if elsewhere:
        shutil.rmtree(other.state)
    made = [one for one in bench.verified() if one.id != keep.id]
    wrong += [] if len(made) == 1 else [f"{len(made)} new verified images"]
    return wrong + _one_holder(bench)


def _race_each_other(with_rollback: bool, bench: Bench) -> list[str]:
    """Two verified images, promoted in turn by some while others prune, sweep and roll back; one holder is left.

    An image that a rollback has taken from its channel may be pruned.
    """
    wrong: list[str] = []
    for number in range(2):
        (bench.tree / "service" / "change").write_text(f"{time.time()} {number}\n")
        commit(bench.tree, "A change")
        done = build(bench, "--promote").finish()
        if done.code:
            return [f"a bake ended with {done.code}:\n{_last(done)}"]
    first, second = sorted(given(one.id) for one in bench.verified())
    threads, over = [], threading.Event()
    for verbs in (
        [["promote", str(first)], ["promote", str(second)]],
        [["promote", str(second)], ["promote", str(first)]],
        [["rollback"]] if with_rollback else [["list"]],
        [["prune", "--yes", "--keep", "1"], ["sweep", "--yes"]],
    ):
        threads.append(threading.Thread(target=_harass, args=(bench, verbs, over, wrong)))
        threads[-1].start()
    time.sleep(20)
    over.set()
    for thread in threads:
        thread.join()
    left = {one.id for one in bench.verified()}
    if not left or not (with_rollback or left == {first, second}):
        wrong.append(f"verified images are {left}, were {first} and {second}")
    return wrong + [f"left: {each}" for each in bench.left()] + _one_holder(bench)


def _together() -> Iterator[Case]:
    yield Case("together", "two bakes, one state", partial(_two_bakes, True))
    yield Case("together", "two bakes, two machines", partial(_two_bakes, False))
    sweep, prune, promote = ["sweep", "--yes"], ["prune", "--yes", "--keep", "1"], ["promote", "ID"]
    for verb in (sweep, prune, promote):
        yield Case("together", f"a bake and {verb[0]}", partial(_race_with_bake, [verb], False))
    every = [sweep, prune, promote]
    yield Case("together", "a bake and all verbs", partial(_race_with_bake, every, False))
    yield Case("together", "a bake and all verbs elsewhere", partial(_race_with_bake, every, True))
    yield Case("together", "promote, prune, sweep", partial(_race_each_other, False))
    yield Case("together", "promote, rollback, prune, sweep", partial(_race_each_other, True))


def list_cases(clean: Clean, seed: int = SEED, lasts_s: float = _LASTS_S) -> list[Case]:
    """The whole plan, the longest cases first."""
    return [
        *_slow(clean, lasts_s),
        *_together(),
        *_outages(clean, seed),
        *_ways(clean),
        *_kills(clean, seed),
        *_reboots(clean, seed),
        *_fatal(clean),
    ]


def run_case(case: Case, bench: Bench, keep: Path | None = None) -> Outcome:
    """Runs a case on a bench that has nothing, and leaves it so; ``keep`` gets the state folder of one that failed."""
    begun_s = time.monotonic()
    try:
        wrong = case.run(bench)
        wrong += [f"secret: {each}" for each in bench.find_secrets()]
    except Exception as error:
        wrong = [f"the test broke: {type(error).__name__}: {error}"]
    took_s = time.monotonic() - begun_s
    if wrong and keep is not None:
        target = keep / re.sub(r"[^A-Za-z0-9]+", "-", f"{case.group} {case.name}").strip("-")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(bench.state, target / "state", ignore_dangling_symlinks=True)
        (target / "wrong.txt").write_text("\n".join(wrong) + "\n")
        shown = ("time", "method", "path", "status", "faults")
        lines = [" ".join(str(one[name]) for name in shown) for one in bench.calls()]
        (target / "calls.txt").write_text("\n".join(lines) + "\n")
    left = sum(1 for each in wrong if each.startswith("left"))
    try:
        bench.clear()
    except Exception as error:
        wrong.append(f"it cannot be cleared away: {type(error).__name__}: {error}")
    return Outcome(case, wrong, left, took_s)


def _work(
    bench: Bench, cases: "queue.SimpleQueue[Case]", outcomes: list[Outcome], total: int, keep: Path | None
) -> None:
    while True:
        try:
            case = cases.get_nowait()
        except queue.Empty:
            return
        outcome = run_case(case, bench, keep)
        outcomes.append(outcome)
        state = "ok" if not outcome.wrong else "FAILED"
        print(f"{len(outcomes)}/{total} {state} {case.group}: {case.name} ({outcome.took_s:.0f} s)", flush=True)
        for line in outcome.wrong:
            print(f"  {line}", flush=True)


def summarize(outcomes: list[Outcome]) -> str:
    """The table: cases, failures and leftovers by group."""
    groups = list(dict.fromkeys(each.case.group for each in outcomes))
    lines = [f"{'group':<14}{'cases':>7}{'failed':>8}{'left':>6}"]
    for group in (*groups, "all"):
        own = [each for each in outcomes if group in (each.case.group, "all")]
        failed = sum(1 for each in own if each.wrong)
        lines.append(f"{group:<14}{len(own):>7}{failed:>8}{sum(each.left for each in own):>6}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the cases, several at a time, each on a cloud of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.bake.fault_plan", description=__doc__.splitlines()[0])
    only_help = "a regular expression; only cases whose group and name have it"
    parser.add_argument("--only", type=parse_pattern, default="", help=only_help)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default 2)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the random moments (default {SEED})")
    parser.add_argument("--lasts", type=float, default=_LASTS_S, help="seconds of each action, where they last long")
    parser.add_argument("--keep", type=Path, help="a folder for the logs of what failed")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    options = parser.parse_args(arguments)
    begun_s = time.monotonic()
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        benches = []
        for _ in range(1 if options.list else options.jobs):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mini-llm-faults-")))
            benches.append(stack.enter_context(running_bench(folder)))
        clean = record(benches[0])
        calls = sum(site.count for site in clean.sites)
        print(
            f"a clean bake took {clean.took_s:.1f} s and made {calls} calls at {len(clean.sites)} sites; "
            f"seed {options.seed}",
            flush=True,
        )
        every = list_cases(clean, options.seed, options.lasts)
        chosen = [case for case in every if options.only.search(f"{case.group}: {case.name}")]
        if not chosen:
            parser.error(f"--only {options.only.pattern!r}: no case has it; --list names them")
        if options.list:
            for site in clean.sites:
                print(f"site {site} ({site.count})")
            for case in chosen:
                print(f"{case.group}: {case.name}")
            return 0
        cases: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in chosen:
            cases.put(case)
        threads = [
            threading.Thread(target=_work, args=(bench, cases, outcomes, len(chosen), options.keep))
            for bench in benches
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            print("stopping after the cases that run", flush=True)
            with suppress(queue.Empty):
                while True:
                    cases.get_nowait()
            for thread in threads:
                thread.join()
    print(summarize(outcomes))
    failed = [each for each in outcomes if each.wrong]
    for each in failed:
        print(f"failed: {each.case.group}: {each.case.name}")
    left = sum(each.left for each in outcomes)
    print(f"{len(outcomes)} cases, {len(failed)} failed, {left} resources left, {time.monotonic() - begun_s:.0f} s")
    return 1 if failed or len(outcomes) < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
