def pytest_configure(config):
    # torch 2.9 and 2.10 answer the older switches of float32 precision, which these tests set, with this.
    config.addinivalue_line("filterwarnings", "ignore:Please use the new API")
