"""transformers' suite for processors."""

import unittest

from overridden import PROCESSOR, overriding
from suites import suite
from tiny_tokenizers import qwen_tokenizer
from tiny_training import word_tokenizer

from modeling_vikdf import VikdfProcessor
from modeling_vikdf.processing_vikdf import KNOWLEDGE_TOKEN


processing = suite("test_processing_common")


@overriding(PROCESSOR)
class ProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VikdfProcessor

    @staticmethod
    def prepare_processor_dict():
        # no image processor: it may be left out, so it is none of the parts that the suite tests
        return {"num_knowledge_tokens": 4}

    @staticmethod
    def _setup_tokenizer():
        tokenizer = qwen_tokenizer()
        tokenizer.add_tokens([KNOWLEDGE_TOKEN], special_tokens=True)
        return tokenizer

    @staticmethod
    def _setup_context_tokenizer():
        return word_tokenizer()
