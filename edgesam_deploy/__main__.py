"""``python -m edgesam_deploy`` is ``sam-export``."""

from edgesam_deploy.cli import main

main()
