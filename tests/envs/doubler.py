"""An agent of OpenAI's agent SDK, a public harness from a package, with one tool."""

import agents
import openai
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel

agents.set_tracing_disabled(True)


async def double(question: str, address: str) -> str:
    """The agent's last answer."""

    @agents.function_tool
    def double(number: int) -> str:
        return str(2 * number)

    async with openai.AsyncOpenAI(base_url=address, api_key="any", max_retries=0) as client:
        model = OpenAIChatCompletionsModel("policy", client)
        agent = agents.Agent("doubler", instructions="Double it.", tools=[double], model=model)
        result = await agents.Runner.run(agent, question, max_turns=5)
    return str(result.final_output)
