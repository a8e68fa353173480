BEGIN TRANSACTION;
CREATE TABLE canary (
	run_id VARCHAR(96) NOT NULL, 
	round INTEGER NOT NULL, 
	policy_id VARCHAR(128) NOT NULL, 
	mean FLOAT, 
	stderr FLOAT, 
	count INTEGER NOT NULL, 
	best_round INTEGER NOT NULL, 
	difference FLOAT, 
	difference_stderr FLOAT, 
	stopped BOOLEAN NOT NULL, 
	PRIMARY KEY (run_id, round)
);
INSERT INTO "canary" VALUES('run',1,'p-1',0.5,NULL,1,1,NULL,NULL,0);
CREATE TABLE evaluator_clocks (
	run_id VARCHAR(96) NOT NULL, 
	seconds_ahead FLOAT NOT NULL, 
	PRIMARY KEY (run_id)
);
CREATE TABLE measurements (
	run_id VARCHAR(96) NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	arm VARCHAR(64) NOT NULL, 
	task INTEGER NOT NULL, 
	sample_index INTEGER NOT NULL, 
	look BLOB, 
	fresh BLOB, 
	stopped BOOLEAN NOT NULL, 
	PRIMARY KEY (run_id, stage, arm, task, sample_index)
);
CREATE TABLE openings (
	run_id VARCHAR(96) NOT NULL, 
	task_id VARCHAR(64) NOT NULL, 
	owners INTEGER NOT NULL, 
	PRIMARY KEY (run_id, task_id)
);
CREATE TABLE requests (
	request_id VARCHAR(256) NOT NULL, 
	body_sha256 VARCHAR(64) NOT NULL, 
	run_id VARCHAR(96) NOT NULL, 
	PRIMARY KEY (request_id)
);
CREATE TABLE round_groups (
	run_id VARCHAR(96) NOT NULL, 
	round INTEGER NOT NULL, 
	groups INTEGER NOT NULL, 
	dropped INTEGER NOT NULL, 
	PRIMARY KEY (run_id, round)
);
INSERT INTO "round_groups" VALUES('run',1,0,0);
CREATE TABLE rounds (
	run_id VARCHAR(96) NOT NULL, 
	round INTEGER NOT NULL, 
	policy_id VARCHAR(128) NOT NULL, 
	kept INTEGER NOT NULL, 
	offered INTEGER NOT NULL, 
	PRIMARY KEY (run_id, round)
);
INSERT INTO "rounds" VALUES('run',1,'p-1',1,1);
CREATE TABLE runs (
	id VARCHAR(96) NOT NULL, 
	number INTEGER NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	state INTEGER NOT NULL, 
	request BLOB NOT NULL, 
	student BLOB NOT NULL, 
	config_sha256 VARCHAR(64) NOT NULL, 
	failure BLOB, 
	resumes INTEGER NOT NULL, 
	base_policy VARCHAR(128) NOT NULL, 
	first_reward_seconds FLOAT, 
	peak_memory_bytes INTEGER NOT NULL, 
	created FLOAT NOT NULL, 
	finished FLOAT, 
	summary_json TEXT NOT NULL, 
	report_html TEXT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE seconds (
	run_id VARCHAR(96) NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	phase VARCHAR(16) NOT NULL, 
	seconds FLOAT NOT NULL, 
	PRIMARY KEY (run_id, stage, phase)
);
CREATE TABLE self_edits (
	run_id VARCHAR(96) NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	arm VARCHAR(64) NOT NULL, 
	task INTEGER NOT NULL, 
	sample_index INTEGER NOT NULL, 
	task_id VARCHAR(64) NOT NULL, 
	policy_id VARCHAR(128) NOT NULL, 
	completion TEXT NOT NULL, 
	malformed TEXT NOT NULL, 
	self_edit BLOB, 
	evaluation_id VARCHAR(64) NOT NULL, 
	evaluation BLOB, 
	cached BOOLEAN NOT NULL, 
	PRIMARY KEY (run_id, stage, arm, task, sample_index)
);
INSERT INTO "self_edits" VALUES('run','round-00001','',0,0,'task','base','text','',X'0A0178','e1',X'0A0265311003320909000000000000E03F',0);
CREATE TABLE written_questions (
	run_id VARCHAR(96) NOT NULL, 
	task INTEGER NOT NULL, 
	task_id VARCHAR(64) NOT NULL, 
	questions BLOB NOT NULL, 
	dropped TEXT NOT NULL, 
	PRIMARY KEY (run_id, task)
);
CREATE INDEX ix_runs_state ON runs (state);
CREATE UNIQUE INDEX ix_runs_number ON runs (number);
CREATE INDEX ix_self_edits_evaluation_id ON self_edits (evaluation_id);
COMMIT;
