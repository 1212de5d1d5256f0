"""Rates of reading and copying memory."""

from bench.measure import rounds_of


def test_rate(benchmark, collected, turn, rate):
    run = rate.run()
    rounds, repetitions = rounds_of(run, "quick", benchmark._timer)
    benchmark.pedantic(run, rounds=rounds, iterations=repetitions)
    collected.add(rate.identity, list(benchmark.stats.stats.data), ours=False, input_sets=1, traffic=rate.traffic)
