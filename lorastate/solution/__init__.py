"""From a setting to every prediction with its error bar: search, description, status."""
