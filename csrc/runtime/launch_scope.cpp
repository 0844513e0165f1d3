#include "fastgpt/launch_scope.h"

namespace fastgpt {
namespace {

thread_local bool overlap = false;

}  // namespace

void set_overlap_launches(bool value) { overlap = value; }

bool overlap_launches() { return overlap; }

}  // namespace fastgpt
