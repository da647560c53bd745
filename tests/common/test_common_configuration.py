"""transformers' suite for configurations."""

import unittest

from overridden import CONFIGURATION, overriding
from suites import suite
from tiny_models import tiny_config

from modeling_vikdf import VikdfConfig


configuration = suite("test_configuration_common")


class ConfigurationTest(unittest.TestCase):
    """Each check of the suite's tester as a test."""

    def setUp(self):
        self.model_tester = self  # asked for a configuration with values of its own
        fields = {"num_knowledge_tokens": 4, "knowledge_pooling": "mean", "condition_queries": True}
        self.config_tester = configuration.ConfigTester(self, VikdfConfig, has_text_modality=False, **fields)

    def get_config(self) -> VikdfConfig:
        return tiny_config()


for check in dir(configuration.ConfigTester):
    if check.startswith(("create_and_test_", "check_")):
        setattr(ConfigurationTest, f"test_{check}", lambda self, check=check: getattr(self.config_tester, check)())

ConfigurationTest = overriding(CONFIGURATION)(ConfigurationTest)
