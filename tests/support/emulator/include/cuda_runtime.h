// Its names come with cuda.hpp, which the emulator includes before every kernel.
#pragma once
