"""What people prefer, as Pyro programs: rewards learned from comparisons and ratings, with their uncertainty."""
