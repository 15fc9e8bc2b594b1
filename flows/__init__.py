"""What a schedule runs: one flow a file, and the command line. Installed as ``selfcascade_flows``."""
