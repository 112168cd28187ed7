"""Divisors of a number, in time that grows with its root."""

import math


def divisors(number: int) -> list[int]:
    """All divisors of a number >= 1, rising."""
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return low + [number // small for small in reversed(low) if small * small != number]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`; 1 where that is below 1."""
    return max((found for found in divisors(number) if found <= limit), default=1)


def nearest_divisors(value: int, *numbers: int) -> str:
    """The common divisors of `numbers` next to `value`, below and above, in words."""
    common = divisors(math.gcd(*numbers))
    below = [number for number in common if number < value][-1:]
    above = [number for number in common if number > value][:1]
    return " or ".join(str(number) for number in below + above)
