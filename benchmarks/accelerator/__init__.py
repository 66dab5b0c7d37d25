"""What a machine with an accelerator is asked, in one command: see `run.sh`."""
