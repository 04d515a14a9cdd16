"""`python -m ws_detectron.doctor`; where importing this package fails, use `ws-doctor`."""

import sys

from ws_doctor import main

if __name__ == "__main__":
    sys.exit(main())
