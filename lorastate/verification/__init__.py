"""Is the theory right for this setting? Training at several D, extrapolated, beside every prediction."""
