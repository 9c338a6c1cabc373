"""What became of a run: its changes, a verdict, plots and a page. `stable-opd report` brings them together."""
