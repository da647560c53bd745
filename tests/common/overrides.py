def overriding(*a): return lambda c: c
