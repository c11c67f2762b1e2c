"""The command line. Starts rooms as processes and talks to them; never imports one."""
