"""Taking turns, with a clock that only the functions move."""

from benchmarks.measure import timing
from benchmarks.measure.compile_time import compile_seconds


class Clock:
    """Time that passes when a function says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def step(self, name, *seconds):
        """A function that takes these seconds, call by call, and the last of them ever after."""
        durations = list(seconds)

        def run():
            self.calls.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return run


def test_functions_take_turns_and_a_slow_one_sits_out():
    clock = Clock()
    steps = {"fast": clock.step("fast", 1.0), "slow": clock.step("slow", 10.0)}
    durations = {"fast": 1.0, "slow": 10.0}
    samples = timing.alternate(steps, durations, repeats=5, seconds=20, clock=clock)
    assert samples == {"fast": [1.0] * 5, "slow": [10.0] * 3 + [None] * 2}
    fast_first, slow_first = ["slow", "fast", "slow"], ["fast", "slow", "fast"]
    alone = ["fast", "fast"]  # the first one of a round is not timed
    assert clock.calls == fast_first + slow_first + fast_first + alone * 2


def test_a_short_function_is_called_often_enough_for_the_clock():
    clock = Clock()
    once = timing.SHORTEST_SAMPLE / 4
    samples = timing.alternate({"f": clock.step("f", once)}, {"f": once}, 2, 20.0, clock)
    assert len(clock.calls) == 2 * (1 + 4)
    assert samples["f"] == [once, once] or max(abs(s / once - 1) for s in samples["f"]) < 1e-9


def test_warm_up_leaves_compiling_out():
    clock = Clock()
    assert timing.warm_up(clock.step("f", 100.0, 50.0, 2.0), clock) == 2.0


def test_compile_time_is_the_first_call_less_the_second():
    class Engine:
        forgotten = 0

        def forget(self):
            self.forgotten += 1

    clock, engine = Clock(), Engine()
    seconds = compile_seconds(engine, lambda: clock.step("f", 5.0, 2.0), clock)
    assert (seconds, engine.forgotten) == (3.0, 1)
