"""What the studies share: training that resumes, and what a few seeds can show."""
