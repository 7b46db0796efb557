"""Two-party computation on shares with a crypto provider: protocols as generators, their dealers, their drivers."""
