// Which instruction sets this process may use: what the processor has and the kernel saves, capped by LLMFAST_CPU_ISA
// (read once) and by set_isa_cap() at run time. A cap lowers, never raises.
#pragma once
#include <string>
#include <vector>

namespace llmfast {

enum class Isa : int { ref = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

const char* name_of(Isa isa);
bool parse_isa(const std::string& name, Isa* isa);

Isa detected_isa();                   // best that the machine supports
Isa active_isa();                     // min(detected, cap)
void set_isa_cap(Isa cap);
bool is_emulated();                    // AVX-512 and AMX, in C++
std::string why_unavailable(Isa isa);  // "" if available, else one clause for people
std::vector<std::string> cpu_features();
std::string cpu_name();

}  // namespace llmfast
