"""The references' own names and manners, for code written against them; nothing imports this."""
