"""Which answers of people to ask for, and what they teach."""
