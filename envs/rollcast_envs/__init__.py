"""What is played: text environments for language models, registered with Gymnasium under `rollcast/`.

Owns the list of built-in ids. Knows Gymnasium and numpy; nothing about tokens, engines or training.
An installed package adds its own environments with `gymnasium.register` and the entry-point group
`rollcast.envs`; nothing here needs to change for that.
"""

import gymnasium

from rollcast_envs.text import TextEnv, TextSpace

__all__ = ["TextEnv", "TextSpace"]

gymnasium.register(id="rollcast/QA-v0", entry_point="rollcast_envs.tasks.qa:QAEnv")
gymnasium.register(id="rollcast/Translation-v0", entry_point="rollcast_envs.tasks.translation:TranslationEnv")
gymnasium.register(id="rollcast/Summarization-v0", entry_point="rollcast_envs.tasks.summarization:SummarizationEnv")
gymnasium.register(id="rollcast/Dialogue-v0", entry_point="rollcast_envs.tasks.dialogue:DialogueEnv")
gymnasium.register(id="rollcast/ToolQA-v0", entry_point="rollcast_envs.tasks.tool_qa:ToolQAEnv")
gymnasium.register(id="rollcast/Classification-v0", entry_point="rollcast_envs.tasks.classification:ClassificationEnv")
gymnasium.register(id="rollcast/Extraction-v0", entry_point="rollcast_envs.tasks.extraction:ExtractionEnv")
gymnasium.register(id="rollcast/Code-v0", entry_point="rollcast_envs.tasks.code:CodeEnv")
gymnasium.register(id="rollcast/Feedback-v0", entry_point="rollcast_envs.tasks.feedback:FeedbackEnv")
gymnasium.register(id="rollcast/ReasoningGym-v0", entry_point="rollcast_envs.adapters.reasoning_gym:ReasoningGymEnv")
gymnasium.register(id="rollcast/TextArena-v0", entry_point="rollcast_envs.adapters.textarena:TextArenaEnv")
gymnasium.register(id="rollcast/SkyRLGym-v0", entry_point="rollcast_envs.adapters.skyrl_gym:SkyRLGymEnv")
